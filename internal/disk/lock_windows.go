package disk

import (
	"os"

	"golang.org/x/sys/windows"
)

// lockFile takes a file for this process until the file is closed. It does not
// wait.
func lockFile(f *os.File) error {
	return windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &windows.Overlapped{})
}
