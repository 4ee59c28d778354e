//go:build unix

package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// lockFile takes a file for this process until the file is closed. It does not
// wait.
func lockFile(f *os.File) error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) }
