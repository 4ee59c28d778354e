//go:build libzt

package bindings

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"ztgate/internal/atomicfile"
)

// Errors of [New] that name a cause an operator can remedy.
var (
	ErrHomeUnusable        = errors.New("home directory unusable")
	ErrHomeInUse           = errors.New("home directory is in use by another process")
	ErrIdentityPermissions = errors.New("identity file can be read by others")
	ErrIdentityMismatch    = errors.New("identity files do not match")
	ErrIdentityInvalid     = errors.New("identity invalid")
	ErrLibrary             = errors.New("unsuitable libzt")
)

// Types of state objects (chapter 05 §6).
const (
	objPublic = iota + 1
	objSecret
	objPlanet
	objMoon
	objPeer
	objNetwork
)

const (
	maxPeers  = 4096   // cache records; another one takes the place of any
	maxObject = 484519 // bytes, the largest object: a network configuration
)

type objectID struct {
	kind int
	id   uint64 // 0 for those that there is one of
}

// store holds the state objects of a home directory (chapter 04 §16). The core
// asks for them on the packet path and with locks held, so it is answered from
// memory; files are written by flush.
type store struct {
	dir  string
	lock *os.File

	mu      sync.Mutex // held for moments only, never during I/O
	objects map[objectID][]byte
	dirty   map[objectID]struct{}
	peers   int
	private bool // changes are not for the disk: the core repeats what it was given

	writing sync.Mutex // serialises flush
	wake    chan struct{}
}

// openStore creates dir if needed, takes its lock and reads what it holds.
func openStore(dir string, log *slog.Logger) (_ *store, err error) {
	if dir == "" {
		return nil, fmt.Errorf("%w: no directory given", ErrHomeUnusable)
	}
	for _, d := range []string{"", "networks.d", "moons.d", "peers.d"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
		}
	}
	s := &store{dir: dir, objects: map[objectID][]byte{}, dirty: map[objectID]struct{}{}, wake: make(chan struct{}, 1)}
	if s.lock, err = os.OpenFile(filepath.Join(dir, "ztgate.lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = s.lock.Close()
		return nil, fmt.Errorf("%w: %s: stop the other process or choose another --home", ErrHomeInUse, dir)
	}
	if err := errors.Join(s.readIdentity(), s.readAll(log)); err != nil {
		return nil, errors.Join(err, s.lock.Close())
	}
	return s, nil
}

func (s *store) path(o objectID) string {
	var name string
	switch o.kind {
	case objPublic:
		name = "identity.public"
	case objSecret:
		name = "identity.secret"
	case objPlanet:
		name = "planet"
	case objMoon:
		name = fmt.Sprintf("moons.d/%016x.moon", o.id)
	case objPeer:
		name = fmt.Sprintf("peers.d/%010x.peer", o.id)
	case objNetwork:
		name = fmt.Sprintf("networks.d/%016x.conf", o.id)
	}
	return filepath.Join(s.dir, name)
}

func mode(o objectID) os.FileMode {
	switch o.kind {
	case objPublic, objPlanet, objMoon:
		return 0o644
	}
	return 0o600
}

// readIdentity reads the identity, if there is one, and checks what the core
// doesn't.
func (s *store) readIdentity() error {
	secretPath, publicPath := s.path(objectID{objSecret, 0}), s.path(objectID{objPublic, 0})
	public, err := os.ReadFile(publicPath)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	havePublic := err == nil
	fi, err := os.Stat(secretPath)
	switch {
	case errors.Is(err, fs.ErrNotExist) && havePublic:
		return fmt.Errorf("%w: %s exists without %s: restore the secret file, or remove the public one to get a new identity",
			ErrIdentityMismatch, publicPath, secretPath)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%w: %s is not a regular file", ErrIdentityInvalid, secretPath)
	case fi.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%w: %s has mode %04o: chmod 600 %[2]s", ErrIdentityPermissions, secretPath, fi.Mode().Perm())
	}
	b, err := os.ReadFile(secretPath)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	secret := strings.TrimSpace(string(b))
	fields := strings.Split(secret, ":") // address:0:public:secret (chapter 01 §2.4)
	if len(fields) != 4 {
		return fmt.Errorf("%w: %s holds no secret key: restore it from a backup", ErrIdentityInvalid, secretPath)
	}
	if have := strings.TrimSpace(string(public)); havePublic && have != strings.Join(fields[:3], ":") {
		return fmt.Errorf("%w: %s does not belong to identity.secret (address %s): restore the pair from a backup, or remove the public file",
			ErrIdentityMismatch, publicPath, fields[0])
	}
	if !havePublic { // the core only writes one that differs
		if err := atomicfile.Write(publicPath, []byte(strings.Join(fields[:3], ":")), 0o644); err != nil {
			return fmt.Errorf("%w: %w", ErrHomeUnusable, err)
		}
	}
	s.objects[objectID{objSecret, 0}] = []byte(secret)
	s.objects[objectID{objPublic, 0}] = []byte(strings.Join(fields[:3], ":"))
	return nil
}

// readAll reads the other objects. A damaged one only costs what it saves.
func (s *store) readAll(log *slog.Logger) error {
	b, err := os.ReadFile(s.path(objectID{objPlanet, 0}))
	if err == nil {
		s.objects[objectID{objPlanet, 0}] = b
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	for _, d := range []struct {
		dir, suffix  string
		kind, digits int
	}{{"moons.d", ".moon", objMoon, 16}, {"networks.d", ".conf", objNetwork, 16}, {"peers.d", ".peer", objPeer, 10}} {
		entries, err := os.ReadDir(filepath.Join(s.dir, d.dir))
		if err != nil {
			return fmt.Errorf("%w: %w", ErrHomeUnusable, err)
		}
		for _, e := range entries {
			name, ok := strings.CutSuffix(e.Name(), d.suffix)
			id, err := strconv.ParseUint(name, 16, 64)
			if !ok || err != nil || len(name) != d.digits || d.kind == objPeer && s.peers >= maxPeers {
				continue
			}
			o := objectID{d.kind, id}
			b, err := os.ReadFile(s.path(o))
			if err != nil || len(b) > maxObject {
				log.Warn("file in home can't be used", "path", s.path(o), "error", err)
				b = []byte("\n") // joined all the same
			}
			if d.kind == objPeer {
				s.peers++
			}
			s.objects[o] = b
		}
	}
	return nil
}

// get copies an object and returns its length, -1 without one or if it is too
// long.
func (s *store) get(o objectID, buf []byte) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.objects[o]
	if !ok || len(b) > len(buf) {
		return -1
	}
	return copy(buf, b)
}

// read returns an object; it must not be changed.
func (s *store) read(o objectID) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.objects[o]
}

// ids lists the objects of a kind.
func (s *store) ids(kind int) []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []uint64
	for o := range s.objects {
		if o.kind == kind {
			out = append(out, o.id)
		}
	}
	return out
}

// put replaces an object; nil removes it. It keeps data.
func (s *store) put(o objectID, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, had := s.objects[o]
	switch {
	case data == nil && !had, data != nil && had && string(old) == string(data):
		return
	case data == nil:
		delete(s.objects, o)
		if o.kind == objPeer {
			s.peers--
		}
	default:
		if o.kind == objPeer && !had {
			s.makeRoom()
		}
		s.objects[o] = data
	}
	if s.private && o.kind == objPlanet {
		return
	}
	s.dirty[o] = struct{}{}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *store) makeRoom() {
	if s.peers < maxPeers {
		s.peers++
		return
	}
	for o := range s.objects {
		if o.kind == objPeer {
			delete(s.objects, o)
			s.dirty[o] = struct{}{}
			return
		}
	}
}

// flush writes what changed. What can't be written stays to be written.
func (s *store) flush() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	todo := make(map[objectID][]byte, len(s.dirty))
	for o := range s.dirty {
		todo[o] = s.objects[o]
	}
	clear(s.dirty)
	s.mu.Unlock()
	var errs []error
	for o, b := range todo {
		err := s.write(o, b)
		if err == nil {
			continue
		}
		errs = append(errs, err)
		s.mu.Lock()
		s.dirty[o] = struct{}{}
		s.mu.Unlock()
	}
	return errors.Join(errs...)
}

func (s *store) write(o objectID, b []byte) error {
	if b != nil {
		return atomicfile.Write(s.path(o), b, mode(o))
	}
	paths := []string{s.path(o)}
	if o.kind == objNetwork {
		paths = append(paths, strings.TrimSuffix(paths[0], ".conf")+".local.conf")
	}
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// close writes what is left and gives up the lock.
func (s *store) close() error { return errors.Join(s.flush(), s.lock.Close()) }
