//go:build e2e

package e2e

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// command prepares a run of the program without settings from the environment.
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), options(t).Binary, args...)
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "ZT") && !strings.HasPrefix(e, "ZEROTIER") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	return cmd
}

func newIdentity(t *testing.T, dir string) {
	t.Helper()
	out, err := command(t, "identity", "new", filepath.Join(dir, "identity.secret"), filepath.Join(dir, "identity.public")).CombinedOutput()
	if err != nil {
		t.Fatalf("identity new: %v\n%s", err, out)
	}
}

// Bad input ends with one clear line on standard error, the documented exit code,
// and an untouched home.
func TestBadInput(t *testing.T) {
	good := t.TempDir()
	newIdentity(t, good)
	home := func(change func(dir string) error) string {
		dir := t.TempDir()
		for _, f := range []string{"identity.secret", "identity.public"} {
			b, err := os.ReadFile(filepath.Join(good, f))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, f), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if change != nil {
			if err := change(dir); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	write := func(name, content string, mode os.FileMode) func(string) error {
		return func(dir string) error {
			p := filepath.Join(dir, name)
			return errors.Join(os.WriteFile(p, []byte(content), mode), os.Chmod(p, mode))
		}
	}
	other := t.TempDir()
	newIdentity(t, other)
	otherPublic, err := os.ReadFile(filepath.Join(other, "identity.public"))
	if err != nil {
		t.Fatal(err)
	}
	taken, err := net.ListenUDP("udp4", &net.UDPAddr{})
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.LocalAddr().String())
	config := filepath.Join(t.TempDir(), "ztgate.yaml")
	if err := os.WriteFile(config, []byte("netwroks:\n  - id: \"8056c2e21c000001\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	runWith := func(home string, more ...string) []string {
		return append([]string{"run", "--home", home, "--listen", "", "--tun", "ztbad0"}, more...)
	}
	for _, c := range []struct {
		name string
		args []string
		code int
		says []string
		home string
	}{
		{"network ID", runWith(home(nil), "--network", "8056c2e21c00000"), 2, []string{"8056c2e21c00000", "16 hex digits"}, ""},
		{"home is a file", runWith(file), 2, []string{file}, ""},
		{"corrupt identity", nil, 2, []string{"identity.secret", "restore it"}, home(write("identity.secret", "rubbish", 0o600))},
		{"empty identity", nil, 2, []string{"identity.secret", "restore it"}, home(write("identity.secret", "", 0o600))},
		{"identity readable by all", nil, 2, []string{"0644", "chmod 600"}, home(func(d string) error { return os.Chmod(filepath.Join(d, "identity.secret"), 0o644) })},
		{"keys of another identity", nil, 2, []string{"identity.public", "does not belong"}, home(write("identity.public", string(otherPublic), 0o644))},
		{"corrupt planet", nil, 2, []string{"planet", "replace it"}, home(write("planet", "rubbish", 0o644))},
		{"port in use", runWith(home(nil), "--port", port), 1, []string{port, "--port"}, ""},
		{"unknown key", runWith(home(nil), "--config", config), 2, []string{"netwroks", "networks"}, ""},
		{"missing file", runWith(home(nil), "--config", config+".no"), 2, []string{config + ".no"}, ""},
		{"overlapping sources", runWith(home(nil), "--source", "172.31.0.0/33"), 2, []string{"172.31.0.0/33"}, ""},
		{"unknown flag", []string{"run", "--netwrok", "1"}, 2, []string{"--netwrok"}, ""},
		{"unknown command", []string{"rnu"}, 2, []string{"rnu"}, ""},
		{"no gateway", []string{"status", "--socket", filepath.Join(t.TempDir(), "none")}, 3, []string{"none", "not running"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := c.args
			if args == nil {
				args = runWith(c.home, "--port", "0")
			}
			before := snapshot(t, c.home)
			cmd := command(t, args...)
			var errOut bytes.Buffer
			cmd.Stderr = &errOut
			err := cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != c.code {
				t.Errorf("%v, want exit code %d\n%s", err, c.code, &errOut)
			}
			var said string // the line of the error, after what the log says
			for line := range strings.Lines(errOut.String()) {
				if strings.HasPrefix(line, "ztgate: ") {
					said += line
				}
			}
			if strings.Count(said, "\n") != 1 {
				t.Errorf("want one line of error, got %q", said)
			}
			for _, want := range c.says {
				if !strings.Contains(said, want) {
					t.Errorf("%q doesn't say %q", said, want)
				}
			}
			if strings.Contains(errOut.String(), "goroutine ") {
				t.Errorf("panic:\n%s", &errOut)
			}
			for name, content := range before {
				if got, _ := os.ReadFile(filepath.Join(c.home, name)); string(got) != content {
					t.Errorf("%s was changed", name)
				}
			}
		})
	}
}

func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	if dir == "" {
		return out
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Type().IsRegular() && e.Name() != "ztgate.lock" {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			out[e.Name()] = string(b)
		}
	}
	return out
}

// Without privileges the program says so.
func TestUnprivileged(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "ztgate")
	b, err := os.ReadFile(options(t).Binary)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(binary, b, 0o755); err != nil {
		t.Fatal(err)
	}
	for p := dir; p != "/tmp" && p != "/"; p = filepath.Dir(p) { // others have to get there
		_ = os.Chmod(p, 0o777)
	}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"lab"}, 2, "root"},
		{[]string{"run", "--home", filepath.Join(dir, "home"), "--listen", "", "--port", "0", "--socket", filepath.Join(dir, "sock")}, 1, "NET_ADMIN"},
	} {
		cmd := command(t, c.args...)
		cmd.Path = binary
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != c.code || !strings.Contains(string(out), c.says) {
			t.Errorf("%v: %v, want exit code %d and a line that names %s\n%s", c.args, err, c.code, c.says, out)
		}
	}
}
