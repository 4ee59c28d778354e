//go:build libzt

package bindings

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"

	"ztgate/internal/atomicfile"
	"ztgate/zerotier/ztnode"
	"ztgate/zerotier/ztnode/home"
)

// ErrLibrary says that libzt isn't the one this package was written for.
var ErrLibrary = errors.New("unsuitable libzt")

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
	home *home.Dir

	mu      sync.Mutex // held for moments only, never during I/O
	objects map[objectID][]byte
	dirty   map[objectID]struct{}
	peers   int
	private bool // changes are not for the disk: the core repeats what it was given

	writing sync.Mutex // serialises flush
	wake    chan struct{}
}

// openStore opens a home and reads what it holds. planet is the operator's, nil for
// none.
func openStore(dir string, planet []byte, log *slog.Logger) (_ *store, err error) {
	s := &store{objects: map[objectID][]byte{}, dirty: map[objectID]struct{}{}, wake: make(chan struct{}, 1)}
	if s.home, err = home.Open(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.home.Close())
		}
	}()
	if err := s.readIdentity(); err != nil {
		return nil, err
	}
	if err := s.readPlanet(planet); err != nil {
		return nil, err
	}
	return s, s.readAll(log)
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
	return s.home.Path(name)
}

func mode(o objectID) os.FileMode {
	switch o.kind {
	case objPublic, objPlanet, objMoon:
		return 0o644
	}
	return 0o600
}

// readIdentity reads the identity, if there is one; else the core makes it.
func (s *store) readIdentity() error {
	id, err := s.home.Identity()
	if id == nil || err != nil {
		return err
	}
	s.objects[objectID{objSecret, 0}] = []byte(id.SecretString())
	s.objects[objectID{objPublic, 0}] = []byte(id.String())
	return nil
}

// readPlanet reads the planet, if there is one; else the core has its own.
func (s *store) readPlanet(given []byte) error {
	w, err := s.home.Planet(given)
	if w == nil || err != nil {
		return err
	}
	s.objects[objectID{objPlanet, 0}] = w.Append(nil)
	return nil
}

// readAll reads the other objects. A damaged one only costs what it saves.
func (s *store) readAll(log *slog.Logger) error {
	for _, d := range []struct {
		dir, suffix  string
		kind, digits int
	}{{"moons.d", ".moon", objMoon, 16}, {"networks.d", ".conf", objNetwork, 16}, {"peers.d", ".peer", objPeer, 10}} {
		entries, err := os.ReadDir(s.home.Path(d.dir))
		if err != nil {
			return fmt.Errorf("%w: %w", ztnode.ErrHomeUnusable, err)
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
func (s *store) close() error { return errors.Join(s.flush(), s.home.Close()) }
