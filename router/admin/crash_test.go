package admin

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"ztgate/internal/disk"
)

// dying is a disk whose process is killed in the middle: after so many changes nothing
// changes any more.
type dying struct {
	disk.OS
	left *int
}

var errKilled = errors.New("killed")

func (d dying) change(f func() error) error {
	if *d.left--; *d.left < 0 {
		return errKilled
	}
	return f()
}

func (d dying) MkdirAll(name string, perm fs.FileMode) error {
	return d.change(func() error { return d.OS.MkdirAll(name, perm) })
}
func (d dying) Chmod(name string, perm fs.FileMode) error {
	return d.change(func() error { return d.OS.Chmod(name, perm) })
}
func (d dying) Remove(name string) error { return d.change(func() error { return d.OS.Remove(name) }) }
func (d dying) RemoveAll(name string) error {
	return d.change(func() error { return d.OS.RemoveAll(name) })
}
func (d dying) Rename(from, to string) error {
	return d.change(func() error { return d.OS.Rename(from, to) })
}
func (d dying) SyncDir(name string) error {
	return d.change(func() error { return d.OS.SyncDir(name) })
}
func (d dying) CreateTemp(dir, pattern string) (f disk.File, err error) {
	err = d.change(func() error { f, err = d.OS.CreateTemp(dir, pattern); return err })
	return f, err
}

// TestImportIsKilled at each of its changes: there are all records or none, and the next
// run goes on.
func TestImportIsKilled(t *testing.T) {
	whole, step := 0, 1
	if testing.Short() {
		step = 7
	}
	for n := 0; n < 1000; n += step {
		to := filepath.Join(t.TempDir(), fmt.Sprint(n))
		left := n
		_, err := importOn(dying{left: &left}, reference, to)
		records := 0
		for path := range files(t, filepath.Join(to, "controller.d")) {
			if filepath.Ext(path) == ".json" {
				records++
			}
		}
		_, idErr := os.Stat(filepath.Join(to, "identity.secret"))
		switch {
		case records == 4 && idErr == nil:
			whole++
		case records != 0:
			t.Fatalf("killed at change %d (%v): %d records, identity %v", n, err, records, idErr)
		case err == nil:
			t.Fatalf("change %d: done, and no records", n)
		default:
			if m, err := ImportController(reference, to); err != nil || m.Members != 3 {
				t.Fatalf("after it was killed at change %d: %v", n, err)
			}
		}
		if err == nil {
			if n < 20 || whole == 0 {
				t.Errorf("%d changes in all", n)
			}
			return
		}
	}
	t.Error("it never ends")
}
