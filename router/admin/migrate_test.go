package admin

import (
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"ztgate/router/fault"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode/home"
)

// The home of a controller that zerotier-one 1.14.1 made: a network with three members,
// and one that belongs to another controller.
const (
	reference = "testdata/zerotier-one"
	network   = "c88745884d72d527"
)

// files returns all files below a directory that aren't locks.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, ".lock") {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		out[rel] = string(b)
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

// copied returns a copy of the reference's home that may be changed.
func copied(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "zerotier-one")
	if err := os.CopyFS(dir, os.DirFS(reference)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func record(t *testing.T, text string) map[string]any {
	t.Helper()
	out := map[string]any{}
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestImport and back: what the reference stored comes back, but for what it never used
// and other ways to write the same.
func TestImport(t *testing.T) {
	for name, dir := range map[string]string{"home": reference, "controller.d": filepath.Join(reference, "controller.d")} {
		t.Run(name, func(t *testing.T) {
			to := filepath.Join(t.TempDir(), "ztgate")
			m, err := ImportController(dir, to)
			if err != nil {
				t.Fatal(err)
			}
			if m.Address != "c88745884d" || m.Networks != 1 || m.Members != 3 || m.Identity != "taken" {
				t.Errorf("%+v", m)
			}
			for _, want := range []string{"network 1234567890123456 is left out", "10.121.15.9 to 10.121.15.2 is left out", "remote trace has no effect"} {
				if !slices.ContainsFunc(m.Notes, func(n string) bool { return strings.Contains(n, want) }) {
					t.Errorf("no note %q in %q", want, m.Notes)
				}
			}
			if fi, err := os.Stat(filepath.Join(to, "identity.secret")); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("identity: %v, %v", fi, err)
			}
			back := filepath.Join(t.TempDir(), "back")
			if m, err := ExportController(to, back); err != nil || m.Networks != 1 || m.Members != 3 {
				t.Fatalf("%+v, %v", m, err)
			}
			before, after := files(t, reference), files(t, back)
			delete(before, "controller.d/network/1234567890123456.json")
			if !slices.Equal(slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after))) {
				t.Fatalf("files %q, want %q", slices.Sorted(maps.Keys(after)), slices.Sorted(maps.Keys(before)))
			}
			for path, text := range before {
				if !strings.HasSuffix(path, ".json") {
					if after[path] != text {
						t.Errorf("%s is another one", path)
					}
					continue
				}
				want, got := record(t, text), record(t, after[path])
				for _, key := range []string{"dns", "rules", "ipAssignmentPools"} {
					if strings.Count(path, "/") == 2 { // of a network: see above
						delete(want, key)
						delete(got, key)
					}
				}
				if !reflect.DeepEqual(got, want) {
					t.Errorf("%s:\n%v, want\n%v", path, got, want)
				}
			}
		})
	}
}

// TestImportIsWhole: whatever is wrong, nothing is taken, and the reason is said.
func TestImportIsWhole(t *testing.T) {
	other, err := identity.Generate(nil)
	if err != nil {
		t.Fatal(err)
	}
	write := func(path, text string) func(*testing.T, string, string) {
		return func(t *testing.T, from, to string) {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(from, path)), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(from, path), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	records := "controller.d/network/" + network
	for _, tt := range []struct {
		name   string
		spoil  func(t *testing.T, from, to string)
		reason string
	}{
		{"no records", func(t *testing.T, from, _ string) {
			if err := os.RemoveAll(filepath.Join(from, "controller.d")); err != nil {
				t.Fatal(err)
			}
		}, "there is no network in it"},
		{"empty record", write(records+".json", ""), network + ".json"},
		{"record cut off", write(records+"/member/1d23c4137a.json", `{"id":"1d23c`), "1d23c4137a.json"},
		{"record of another member", write(records+"/member/1d23c4137a.json", `{"id":"0000000001"}`), "record is of member 0000000001"},
		{"rule that nobody knows", write(records+".json", `{"id":"`+network+`","rules":[{"type":"MATCH_MOON"}]}`), "MATCH_MOON"},
		{"name servers that can't be", write(records+".json", `{"id":"`+network+`","dns":{"domain":"x","servers":["0.0.0.0"]}}`), "dns"},
		{"no identity", func(t *testing.T, from, _ string) {
			if err := os.Remove(filepath.Join(from, "identity.secret")); err != nil {
				t.Fatal(err)
			}
		}, "networks belong to the identity"},
		{"identity that isn't one", write("identity.secret", "x"), "identity.secret"},
		{"identity without secret", write("identity.secret", other.Public().String()), "no secret key"},
		{"another controller's", write("identity.secret", other.SecretString()), "no network of controller " + other.Address().String()},
		{"our identity is another", func(t *testing.T, _, to string) {
			h, err := home.Open(to)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			if err := h.StoreIdentity(other); err != nil {
				t.Fatal(err)
			}
		}, "choose an empty home"},
		{"we have networks", func(t *testing.T, from, to string) {
			if _, err := ImportController(from, to); err != nil {
				t.Fatal(err)
			}
		}, "has 1 networks already"},
		{"something else lies there", func(t *testing.T, _, to string) {
			write("controller.d/notes.txt", "x")(t, to, "")
		}, "controller.d"},
		{"zerotier-one runs", func(t *testing.T, from, _ string) {
			program := filepath.Join(t.TempDir(), "zerotier-one") // by its name
			sleep, err := os.ReadFile("/bin/sleep")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(program, sleep, 0o700); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), program, "60")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
			write("zerotier-one.pid", strconv.Itoa(cmd.Process.Pid)+"\n")(t, from, "")
		}, "stop it first"},
		{"a process uses our home", func(t *testing.T, _, to string) {
			h, err := home.Open(to)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = h.Close() })
		}, "in use"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from, to := copied(t), filepath.Join(t.TempDir(), "ztgate")
			tt.spoil(t, from, to)
			before := files(t, to)
			m, err := ImportController(from, to)
			if fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), tt.reason) {
				t.Errorf("%+v, %v; want %q", m, err, tt.reason)
			}
			if after := files(t, to); !maps.Equal(before, after) {
				t.Errorf("%q became %q", slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
			}
		})
	}
}

// TestImportAgain: what a run that was killed left doesn't keep the next one from
// working.
func TestImportAgain(t *testing.T) {
	to := t.TempDir()
	for path, text := range map[string]string{"controller.d.import/network/" + network + ".json": "{", "controller.d/network/.keep": ""} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(to, path)), 0o700); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path, ".json") {
			if err := os.WriteFile(filepath.Join(to, path), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if m, err := ImportController(reference, to); err != nil || m.Networks != 1 {
		t.Fatalf("%+v, %v", m, err)
	}
	if _, err := os.Stat(filepath.Join(to, "controller.d.import")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("something is left")
	}
}

func TestExportRefusals(t *testing.T) {
	to := filepath.Join(t.TempDir(), "ztgate")
	if _, err := ExportController(to, filepath.Join(t.TempDir(), "back")); fault.ExitCode(err) != 2 {
		t.Errorf("no controller: %v", err)
	}
	if _, err := ImportController(reference, to); err != nil {
		t.Fatal(err)
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ExportController(to, full); fault.ExitCode(err) != 2 || len(files(t, full)) != 1 {
		t.Errorf("a directory with files: %v", err)
	}
	if err := os.WriteFile(filepath.Join(to, "controller.d", "network", network+".json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	back := filepath.Join(t.TempDir(), "back")
	if _, err := ExportController(to, back); err == nil || !strings.Contains(err.Error(), network) {
		t.Errorf("a broken record: %v", err)
	}
	if _, err := os.Stat(back); !errors.Is(err, fs.ErrNotExist) {
		t.Error("something was exported")
	}
	// What stands beside is gone too.
	if entries, err := os.ReadDir(filepath.Dir(back)); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
	}
}
