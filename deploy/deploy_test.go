// Package deploy tests the files for service managers and monitoring.
package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// TestUnits: the units are valid, and leave little to who takes a process over.
func TestUnits(t *testing.T) {
	const most = 2.0 // of 10
	units, err := filepath.Glob("systemd/*.service")
	if err != nil || len(units) < 2 {
		t.Fatalf("%q, %v", units, err)
	}
	for _, unit := range units {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"Type=notify", "WatchdogSec=", "Restart=always", "StartLimitIntervalSec=0"} {
			if !strings.Contains(string(text), "\n"+want) {
				t.Errorf("%s lacks %s", unit, want)
			}
		}
		if _, err := exec.LookPath("systemd-analyze"); err != nil {
			t.Skip("needs systemd-analyze")
		}
		out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", unit).CombinedOutput()
		m := regexp.MustCompile(`Overall exposure level for \S+: (\d+\.\d)`).FindSubmatch(out)
		if err != nil || m == nil {
			t.Fatalf("%s: %v\n%s", unit, err, out)
		}
		if got, err := strconv.ParseFloat(string(m[1]), 64); err != nil || got >= most {
			t.Errorf("%s: exposure %v, %v, want less than %v\n%s", unit, got, err, most, out)
		}
		out, _ = exec.Command("systemd-analyze", "verify", unit).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if !strings.Contains(line, "is not executable") { // it isn't installed here
				t.Errorf("%s: %s", unit, line)
			}
		}
	}
}

// TestAlerts: each rule is about metrics that there are, and Prometheus understands it.
func TestAlerts(t *testing.T) {
	const file = "prometheus/alerts.yml"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	d := yaml.NewDecoder(strings.NewReader(string(text)))
	d.KnownFields(true)
	if err := d.Decode(&rules); err != nil {
		t.Fatal(err)
	}
	source := sources(t)
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			if r.Alert == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" || r.Labels["severity"] == "" {
				t.Errorf("%+v is not complete", r)
			}
			for _, name := range regexp.MustCompile(`ztgate_\w+`).FindAllString(r.Expr, -1) {
				if !strings.Contains(source, `"`+strings.TrimSuffix(name, "_bucket")+`"`) {
					t.Errorf("%s: there is no metric %s", r.Alert, name)
				}
			}
		}
	}
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Skip("promtool isn't installed")
	}
	if out, err := exec.Command("promtool", "check", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

// sources returns the text of the files that declare metrics.
func sources(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, pattern := range []string{"../netstack/*.go", "../router/gateway/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all.Write(b)
		}
	}
	return all.String()
}
