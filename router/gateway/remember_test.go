package gateway

import (
	"path/filepath"
	"testing"

	"ztgate/router/config"
)

// TestRememberOnFullDisk: what is remembered already isn't written, so that a start
// doesn't need room on the disk. What changes is.
func TestRememberOnFullDisk(t *testing.T) {
	cfg, err := config.Load(config.Sources{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := remember(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.join(1, true); err != nil {
		t.Fatal(err)
	}
	m.path = filepath.Join(t.TempDir(), "nothing can be written here", memoryFile)
	if err := m.keep(cfg); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if err := m.join(2, true); err == nil {
		t.Error("a change that isn't written is taken for one")
	}
	if list := m.joined(); len(list) != 1 {
		t.Errorf("joined: %v", list)
	}
}
