// Package atomicfile replaces files so that a crash at any moment leaves either
// the old content or the new one.
package atomicfile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"ztgate/internal/disk"
)

// Write replaces path by data. The file has mode perm from its first byte, so a
// secret is never readable by others, not even for a moment.
func Write(path string, data []byte, perm os.FileMode) error {
	return WriteOn(disk.OS{}, path, data, perm)
}

// WriteOn is [Write] for another disk.
func WriteOn(d disk.FS, path string, data []byte, perm os.FileMode) error {
	return Stream(d, path, perm, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// Stream is [WriteOn] for content that is made piece by piece.
func Stream(d disk.FS, path string, perm os.FileMode, content func(io.Writer) error) (err error) {
	dir := filepath.Dir(path)
	f, err := d.CreateTemp(dir, "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", path, err), f.Close(), d.Remove(f.Name()))
		}
	}()
	if err = content(f); err != nil {
		return err
	}
	if err = f.Chmod(perm); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = d.Rename(f.Name(), path); err != nil {
		return err
	}
	return d.SyncDir(dir)
}
