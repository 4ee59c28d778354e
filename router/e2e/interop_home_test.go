//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"ztgate/router/lab"
)

// A home moves from a real node to ours and back, also to an older one: the same
// address, the network still joined without being told, traffic at once.
func TestInteropHome(t *testing.T) {
	t.Parallel()
	real := reference(t)
	recordTest(t, row{property: "home moves between makes", root: nameOurs, controller: nameOurs, member: memberNames(t), gateway: "-"})
	m := mesh(t, "", []lab.MeshMember{{Name: "mover", ZeroTierOne: real}, {Name: "ours"}, {Name: "real", ZeroTierOne: real}})
	id := network(t, m, nil)
	allReach(t, m)
	mover := m.Nodes[0]
	const secret = "identity.secret"
	want := read(t, filepath.Join(mover.Home, secret))
	for _, next := range []struct{ name, path string }{{"to ours", ""}, {"back to the real one", real}, {"to ours again", ""}, {"to the older real one", older()}} {
		mover.Process.Stop()
		cached := filepath.Join(mover.Home, "networks.d", id.String()+".conf")
		if len(read(t, cached)) < 100 {
			t.Errorf("%s: %s holds no configuration", next.name, cached)
		}
		mover.Become(next.path)
		if err := mover.Start(m.Context()); err != nil {
			t.Fatal(err)
		}
		joined(t, mover, id)
		allReach(t, m)
		if got := read(t, filepath.Join(mover.Home, secret)); got != want {
			t.Fatalf("%s: the identity changed", next.name)
		}
		t.Logf("%s: still %s, network joined, all reach each other", next.name, mover.Address)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
