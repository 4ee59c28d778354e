package home

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ztgate/internal/disk"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

// The operator's planet is stored if it is another one or a newer one; a moon is none.
func TestPlanet(t *testing.T) {
	id, err := identity.Parse("0000000001:0:" + strings.Repeat("1", 128))
	if err != nil {
		t.Fatal(err)
	}
	roots := []vl1.Root{{Identity: id, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.1:9993")}}}
	planet := func(id uint64, ts int64) []byte { return vl1.NewPlanet(id, ts, roots, vl1.Key{}).Append(nil) }
	moon := (&vl1.World{Moon: true, ID: 1, Timestamp: 99, Roots: roots}).Append(nil)

	d, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if w, err := d.Planet(nil); w != nil || err != nil {
		t.Errorf("without a planet: %v, %v", w, err)
	}
	for _, c := range []struct {
		name  string
		given []byte
		want  int64 // timestamp of the planet in use
		err   error
	}{
		{"a moon", moon, 0, ztnode.ErrPlanetInvalid},
		{"rubbish", []byte("rubbish"), 0, ztnode.ErrPlanetInvalid},
		{"first", planet(1, 10), 10, nil},
		{"older", planet(1, 9), 10, nil},
		{"none", nil, 10, nil},
		{"newer", planet(1, 11), 11, nil},
		{"another, older", planet(2, 5), 5, nil},
	} {
		w, err := d.Planet(c.given)
		if !errors.Is(err, c.err) || c.err == nil && w.Timestamp != c.want {
			t.Errorf("%s: %+v, %v", c.name, w, err)
		}
	}
	if err := os.WriteFile(d.Path("planet"), moon, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Planet(planet(1, 12)); !errors.Is(err, ztnode.ErrPlanetInvalid) {
		t.Errorf("a moon in home: %v", err)
	}
}

// syncs notes which directories were made durable.
type syncs struct {
	disk.OS
	dirs map[string]bool
}

func (s syncs) SyncDir(name string) error {
	s.dirs[name] = true
	return s.OS.SyncDir(name)
}

// TestDurable: what a process wrote that was killed before it could sync the directory
// is used by the next one, which never writes it again. So it syncs.
func TestDurable(t *testing.T) {
	s, path := syncs{dirs: map[string]bool{}}, t.TempDir()
	d, err := OpenOn(s, path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, name := range []string{"", "networks.d", "moons.d"} {
		if !s.dirs[filepath.Join(path, name)] {
			t.Errorf("%q isn't synced", name)
		}
	}
}
