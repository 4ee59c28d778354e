// Package disk is where processes keep their state: the machine's files, or, in
// simulations, ones that fail and forget as a disk does when its power goes.
package disk

import (
	"io"
	"io/fs"
	"os"
	"time"
)

// FS are the operations on files that state is kept with. Names are paths of the
// machine.
type FS interface {
	Open(name string) (fs.File, error)
	ReadFile(name string) ([]byte, error)
	ReadDir(name string) ([]fs.DirEntry, error)
	Stat(name string) (fs.FileInfo, error)
	MkdirAll(name string, perm fs.FileMode) error
	Chmod(name string, perm fs.FileMode) error
	Chtimes(name string, at time.Time) error
	Remove(name string) error
	RemoveAll(name string) error
	Rename(from, to string) error
	CreateTemp(dir, pattern string) (File, error) // for its owner alone to read
	SyncDir(name string) error                    // makes renames and removals in a directory durable
	// Lock takes a file for this process, without waiting, until it is closed. An error
	// that isn't a [*fs.PathError] means that somebody else has it.
	Lock(name string) (io.Closer, error)
}

// File is a file that is written.
type File interface {
	io.WriteCloser
	Name() string
	Chmod(fs.FileMode) error
	Sync() error
}

// Or returns f, or the machine's files if there is none.
func Or(f FS) FS {
	if f == nil {
		return OS{}
	}
	return f
}

// OS are the files of the machine.
type OS struct{}

func (OS) Open(name string) (fs.File, error)            { return os.Open(name) }
func (OS) ReadFile(name string) ([]byte, error)         { return os.ReadFile(name) }
func (OS) ReadDir(name string) ([]fs.DirEntry, error)   { return os.ReadDir(name) }
func (OS) Stat(name string) (fs.FileInfo, error)        { return os.Stat(name) }
func (OS) MkdirAll(name string, perm fs.FileMode) error { return os.MkdirAll(name, perm) }
func (OS) Chmod(name string, perm fs.FileMode) error    { return os.Chmod(name, perm) }
func (OS) Chtimes(name string, at time.Time) error      { return os.Chtimes(name, at, at) }
func (OS) Remove(name string) error                     { return os.Remove(name) }
func (OS) RemoveAll(name string) error                  { return os.RemoveAll(name) }
func (OS) Rename(from, to string) error                 { return os.Rename(from, to) }

// CreateTemp implements [FS].
func (OS) CreateTemp(dir, pattern string) (File, error) { return os.CreateTemp(dir, pattern) }

// SyncDir implements [FS].
func (OS) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Lock implements [FS].
func (OS) Lock(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockFile(f); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
