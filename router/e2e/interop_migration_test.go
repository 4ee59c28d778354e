//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ztgate/router/lab"
	"ztgate/zerotier/ztnode"
)

// TestInteropMigration moves a controller from a real node to ours, by import into an
// empty home, and back, by export. Its members stay members, and new ones get in.
func TestInteropMigration(t *testing.T) {
	t.Parallel()
	real := reference(t)
	recordTest(t, row{property: "controller moves to ours and back", root: version(t, real), controller: version(t, real), member: "ours," + version(t, real), gateway: "-"})
	m := startMesh(t, lab.MeshOptions{Prefix: "mig", Separate: true, Controller: real, Members: []lab.MeshMember{{Name: "ours"}, {Name: "real", ZeroTierOne: real}}})
	id := network(t, m, map[string]any{"tags": []any{map[string]any{"id": 7, "default": 3}}})
	allReach(t, m)
	home := m.Controller.Home
	move := func(to, path string, how func(from string)) {
		t.Helper()
		m.Controller.Process.Stop()
		from := home + "." + strings.ReplaceAll(to, " ", "-")
		if err := os.Rename(home, from); err != nil {
			t.Fatal(err)
		}
		how(from)
		m.Controller.Become(path)
		if err := m.Controller.Start(m.Context()); err != nil {
			t.Fatal(err)
		}
		lets(t, m, id, strings.Fields(to)[1])
		allReach(t, m)
		t.Logf("%s: %d members reach each other", to, len(m.Nodes))
	}
	command := func(args ...string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), options(t).Binary, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", args, err, out)
		}
		t.Logf("%s", out)
	}
	move("to ours", "", func(from string) { command("controller", "import", from, "--home", home) })
	move("to theirs", real, func(from string) { command("controller", "export", home, "--home", from) })
	if b := read(t, filepath.Join(home, "controller.d", "network", id.String()+".json")); !strings.Contains(b, `"default":3`) {
		t.Errorf("the tag is lost: %s", b)
	}
}

// lets lets one more member in.
func lets(t *testing.T, m *lab.Mesh, id ztnode.NetworkID, name string) {
	t.Helper()
	n, err := m.Add(m.Context(), lab.MeshMember{Name: "late" + name})
	if err != nil {
		t.Fatal(err)
	}
	admit(t, m, id, len(m.Nodes)-1, n)
	joined(t, n, id)
}
