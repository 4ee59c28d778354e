package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"ztgate/internal/disk"
)

// memDisk is a disk with a cache that is lost when its machine crashes: content that
// was not synced may be cut anywhere, and of changes of directories that were not
// synced only the first ones may be there.
type memDisk struct {
	now     func() time.Time
	files   map[string]*inode
	dirs    map[string]bool
	durable map[string]*inode
	pending []change
	temp    int
	locked  bool

	ops     int
	crashAt int  // operation at which the machine crashes; 0 = none
	full    bool // nothing can be written

	// good is what a name may hold after a crash: what it had for sure, and what has
	// replaced that since. nil in it stands for no file.
	good map[string][][]byte
}

// crash is what an operation panics with at which the machine crashes.
type crash struct{}

type inode struct {
	data   []byte
	synced []byte // nil = never
	mode   fs.FileMode
	at     time.Time
}

// change of a directory that isn't synced.
type change struct {
	name string
	to   *inode // nil = removed
}

var _ disk.FS = (*memDisk)(nil)

func newDisk(now func() time.Time) *memDisk {
	return &memDisk{now: now, files: map[string]*inode{}, dirs: map[string]bool{"/": true, "/home": true}, durable: map[string]*inode{}, good: map[string][][]byte{}}
}

// op is the begin of every operation that changes something.
func (d *memDisk) op(name string, writes bool) error {
	d.ops++
	if d.ops == d.crashAt {
		panic(crash{})
	}
	if writes && d.full {
		return &fs.PathError{Op: "write", Path: name, Err: syscall.ENOSPC}
	}
	return nil
}

func (d *memDisk) set(name string, n *inode) {
	if n == nil {
		delete(d.files, name)
	} else {
		d.files[name] = n
	}
	d.pending = append(d.pending, change{name, n})
}

// lose is what a crash does to the disk. It returns names that then hold what they
// never should.
func (d *memDisk) lose(r *rand.Rand) (bad []string) {
	for _, c := range d.pending[:r.IntN(len(d.pending)+1)] {
		if c.to == nil {
			delete(d.durable, c.name)
		} else {
			d.durable[c.name] = c.to
		}
	}
	d.pending, d.locked, d.crashAt, d.full = nil, false, 0, false
	for _, name := range slices.Sorted(maps.Keys(d.durable)) {
		if n := d.durable[name]; n.synced == nil || !bytes.Equal(n.synced, n.data) {
			n.data = n.data[:r.IntN(len(n.data)+1)]
			n.synced = n.data
		}
	}
	d.files = maps.Clone(d.durable)
	for _, name := range slices.Sorted(maps.Keys(d.good)) {
		var have []byte
		if n := d.files[name]; n != nil {
			have = n.data
		}
		if !slices.ContainsFunc(d.good[name], func(b []byte) bool { return bytes.Equal(b, have) && (b == nil) == (have == nil) }) {
			bad = append(bad, fmt.Sprintf("%s holds %d bytes that nobody wanted there, of %d contents", name, len(have), len(d.good[name])))
		}
		d.good[name] = [][]byte{have}
	}
	return bad
}

// tear cuts a file in the middle of a line, as a disk does that lies about what it has
// synced.
func (d *memDisk) tear(name string, r *rand.Rand) []byte {
	n := d.files[name]
	if n == nil || len(n.data) == 0 {
		return nil
	}
	cut := 1 + r.IntN(len(n.data))
	for cut > 1 && (n.data[cut-1] == '\n' || cut == len(n.data) || n.data[cut] == '\n') {
		cut--
	}
	n.data = slices.Clone(n.data[:cut])
	n.synced = n.data
	d.good[name] = [][]byte{n.data}
	return n.data
}

func notExist(op, name string) error { return &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist} }

// Open implements [disk.FS].
func (d *memDisk) Open(name string) (fs.File, error) {
	n := d.files[filepath.Clean(name)]
	if n == nil {
		return nil, notExist("open", name)
	}
	return &reader{bytes.NewReader(n.data), n.info(name)}, nil
}

// ReadFile implements [disk.FS].
func (d *memDisk) ReadFile(name string) ([]byte, error) {
	n := d.files[filepath.Clean(name)]
	if n == nil {
		return nil, notExist("open", name)
	}
	return slices.Clone(n.data), nil
}

// ReadDir implements [disk.FS].
func (d *memDisk) ReadDir(name string) (out []fs.DirEntry, err error) {
	name = filepath.Clean(name)
	if !d.dirs[name] {
		return nil, notExist("open", name)
	}
	for _, f := range slices.Sorted(maps.Keys(d.files)) {
		if filepath.Dir(f) == name {
			out = append(out, fs.FileInfoToDirEntry(d.files[f].info(f)))
		}
	}
	return out, nil
}

// Stat implements [disk.FS].
func (d *memDisk) Stat(name string) (fs.FileInfo, error) {
	if n := d.files[filepath.Clean(name)]; n != nil {
		return n.info(name), nil
	}
	return nil, notExist("stat", name)
}

// MkdirAll implements [disk.FS].
func (d *memDisk) MkdirAll(name string, _ fs.FileMode) error {
	for p := filepath.Clean(name); !d.dirs[p]; p = filepath.Dir(p) {
		if err := d.op(name, true); err != nil {
			return err
		}
		d.dirs[p] = true
	}
	return nil
}

// Chmod implements [disk.FS].
func (d *memDisk) Chmod(name string, perm fs.FileMode) error {
	if n := d.files[filepath.Clean(name)]; n != nil {
		n.mode = perm
	}
	return nil
}

// Chtimes implements [disk.FS].
func (d *memDisk) Chtimes(name string, at time.Time) error {
	if n := d.files[filepath.Clean(name)]; n != nil {
		n.at = at
	}
	return nil
}

// Remove implements [disk.FS].
func (d *memDisk) Remove(name string) error {
	name = filepath.Clean(name)
	if err := d.op(name, false); err != nil {
		return err
	}
	if d.files[name] == nil {
		return notExist("remove", name)
	}
	d.set(name, nil)
	if g, ok := d.good[name]; ok {
		d.good[name] = append(g, nil)
	}
	return nil
}

// RemoveAll implements [disk.FS].
func (d *memDisk) RemoveAll(name string) error {
	name = filepath.Clean(name)
	for _, f := range slices.Sorted(maps.Keys(d.files)) {
		if strings.HasPrefix(f, name+"/") {
			if err := d.Remove(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// Rename implements [disk.FS].
func (d *memDisk) Rename(from, to string) error {
	from, to = filepath.Clean(from), filepath.Clean(to)
	if err := d.op(to, false); err != nil {
		return err
	}
	n := d.files[from]
	if n == nil {
		return notExist("rename", from)
	}
	if d.good[to] == nil {
		d.good[to] = [][]byte{nil}
	}
	d.good[to] = append(d.good[to], slices.Clone(n.data))
	// One change: a rename is never done by half.
	delete(d.files, from)
	d.pending = append(d.pending, change{from, nil})
	d.set(to, n)
	return nil
}

// SyncDir implements [disk.FS].
func (d *memDisk) SyncDir(name string) error {
	name = filepath.Clean(name)
	if err := d.op(name, false); err != nil {
		return err
	}
	if !d.dirs[name] {
		return notExist("open", name)
	}
	var rest []change
	for _, c := range d.pending {
		if filepath.Dir(c.name) != name {
			rest = append(rest, c)
			continue
		}
		if c.to == nil {
			delete(d.durable, c.name)
		} else {
			d.durable[c.name] = c.to
		}
		if g := d.good[c.name]; len(g) > 0 {
			d.good[c.name] = g[len(g)-1:]
		}
	}
	d.pending = rest
	return nil
}

// Lock implements [disk.FS].
func (d *memDisk) Lock(string) (io.Closer, error) {
	if d.locked {
		return nil, errors.New("locked")
	}
	d.locked = true
	return unlocker{d}, nil
}

type unlocker struct{ d *memDisk }

func (u unlocker) Close() error { u.d.locked = false; return nil }

// CreateTemp implements [disk.FS].
func (d *memDisk) CreateTemp(dir, pattern string) (disk.File, error) {
	dir = filepath.Clean(dir)
	if err := d.op(dir, true); err != nil {
		return nil, err
	}
	if !d.dirs[dir] {
		return nil, notExist("open", dir)
	}
	d.temp++
	n := &inode{data: []byte{}, mode: 0o600, at: d.now()}
	name := filepath.Join(dir, strings.Replace(pattern, "*", fmt.Sprint(d.temp), 1))
	d.set(name, n)
	return &writer{d, name, n}, nil
}

type writer struct {
	d    *memDisk
	name string
	n    *inode
}

func (w *writer) Name() string { return w.name }

func (w *writer) Write(b []byte) (int, error) {
	if err := w.d.op(w.name, true); err != nil {
		return 0, err
	}
	w.n.data = append(w.n.data, b...)
	w.n.at = w.d.now()
	return len(b), nil
}

func (w *writer) Chmod(m fs.FileMode) error { w.n.mode = m; return nil }

func (w *writer) Sync() error {
	if err := w.d.op(w.name, false); err != nil {
		return err
	}
	w.n.synced = slices.Clone(w.n.data)
	return nil
}

func (w *writer) Close() error { return nil }

type reader struct {
	*bytes.Reader
	fi fs.FileInfo
}

func (r *reader) Stat() (fs.FileInfo, error) { return r.fi, nil }
func (r *reader) Close() error               { return nil }

type info struct {
	name string
	n    *inode
}

func (n *inode) info(name string) fs.FileInfo { return info{filepath.Base(name), n} }

func (i info) Name() string       { return i.name }
func (i info) Size() int64        { return int64(len(i.n.data)) }
func (i info) Mode() fs.FileMode  { return i.n.mode }
func (i info) ModTime() time.Time { return i.n.at }
func (i info) IsDir() bool        { return false }
func (i info) Sys() any           { return nil }
