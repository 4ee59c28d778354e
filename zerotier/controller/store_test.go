package controller

import (
	"path/filepath"
	"testing"

	"ztgate/internal/disk"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// syncs notes which directories were made durable.
type syncs struct {
	disk.OS
	dirs map[string]bool
}

func (s syncs) SyncDir(name string) error {
	s.dirs[name] = true
	return s.OS.SyncDir(name)
}

// TestReadRecordsAreDurable: what a process wrote that was killed before it could sync
// the directory is known to the next one, which never writes it again. So it syncs.
func TestReadRecordsAreDurable(t *testing.T) {
	id, err := identity.Generate(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := syncs{dirs: map[string]bool{}}
	cfg := Config{Identity: id, Dir: t.TempDir(), Disk: s, Send: func(identity.Address, packet.Verb, []byte, bool) {}}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n, err := c.CreateNetwork(DefaultNetwork())
	if err != nil {
		t.Fatal(err)
	}
	clear(s.dirs)
	if _, err := New(cfg); err != nil {
		t.Fatal(err)
	}
	networks := filepath.Join(cfg.Dir, "network")
	for _, d := range []string{cfg.Dir, networks, filepath.Join(networks, n.ID.String()), filepath.Join(networks, n.ID.String(), "member")} {
		if !s.dirs[d] {
			t.Errorf("%s isn't synced", d)
		}
	}
}
