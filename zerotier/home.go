package zerotier

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"ztgate/internal/atomicfile"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
	"ztgate/zerotier/ztnode/home"
)

// store is the home of a node (chapter 04 §16). Files it doesn't know are left alone.
type store struct{ *home.Dir }

// identity loads the identity, or makes a new one if the home has none.
func (s *store) identity() (*identity.Identity, error) {
	id, err := s.Identity()
	if id != nil || err != nil {
		return id, err
	}
	if id, err = identity.Generate(nil); err != nil {
		return nil, fmt.Errorf("generate identity: %w", err)
	}
	return id, s.StoreIdentity(id)
}

// planet returns the planet to use; given is the operator's, nil for none.
func (s *store) planet(given []byte) (*vl1.World, error) {
	w, err := s.Planet(given)
	if w == nil && err == nil {
		w = vl1.DefaultPlanet()
	}
	return w, err
}

// moons reads the moons that are orbited (chapter 02 §3.6). A damaged file is
// reported and left alone.
func (s *store) moons() (out []*vl1.World, err error) {
	entries, err := os.ReadDir(s.Path("moons.d"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ztnode.ErrHomeUnusable, err)
	}
	var errs []error
	for _, e := range entries {
		id, ok := vl1.ParseMoonFile(e.Name())
		if !ok {
			continue
		}
		b, err := os.ReadFile(s.Path("moons.d", e.Name()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		w, _, err := vl1.ParseWorld(b)
		if err == nil && (!w.Moon || w.ID != id) {
			err = errors.New("it holds another world")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("moon %s: %w", s.Path("moons.d", e.Name()), err))
			continue
		}
		out = append(out, w)
	}
	return out, errors.Join(errs...)
}

func (s *store) storeMoon(w *vl1.World) error {
	return atomicfile.Write(s.Path("moons.d", vl1.MoonFile(w.ID)), w.Append(nil), 0o644)
}

func (s *store) removeMoon(id uint64) error {
	if err := os.Remove(s.Path("moons.d", vl1.MoonFile(id))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget moon %016x: %w", id, err)
	}
	return nil
}

// peer looks a peer up in the cache (chapter 02 §4.11); nil if it isn't there.
func (s *store) peer(a identity.Address) *vl1.PeerRecord {
	b, err := os.ReadFile(s.Path("peers.d", vl1.PeerFile(a)))
	if err != nil {
		return nil
	}
	r, err := vl1.ParsePeerRecord(b)
	if err != nil || r.Identity.Address() != a {
		return nil
	}
	return r
}

// peers lists the newest records of the peer cache, of at most so many peers.
func (s *store) peers(most int) (out []identity.Address) {
	entries, err := os.ReadDir(s.Path("peers.d"))
	if err != nil {
		return nil
	}
	type file struct {
		peer identity.Address
		at   time.Time
	}
	var files []file
	for _, e := range entries {
		a, ok := vl1.ParsePeerFile(e.Name())
		if !ok {
			continue
		}
		if fi, err := e.Info(); err == nil && time.Since(fi.ModTime()) < vl1.PeerRecordLifetime {
			files = append(files, file{a, fi.ModTime()})
		}
	}
	slices.SortFunc(files, func(a, b file) int { return b.at.Compare(a.at) })
	for _, f := range files[:min(len(files), most)] {
		out = append(out, f.peer)
	}
	return out
}

// storePeer keeps the endpoints of an older record if a peer has none any more: they may
// do again.
func (s *store) storePeer(r vl1.PeerRecord) error {
	if len(r.Endpoints) == 0 {
		if old := s.peer(r.Identity.Address()); old != nil {
			r.Endpoints = old.Endpoints
		}
	}
	return atomicfile.Write(s.Path("peers.d", vl1.PeerFile(r.Identity.Address())), r.Append(nil), 0o600)
}

// storedNetwork is a network to join, with the cached configuration if one can be
// read.
type storedNetwork struct {
	id     vl2.NetworkID
	config *vl2.NetworkConfig
	at     time.Time
}

// networks lists the networks to join, those whose files are oldest first (chapter
// 03 §1.7). A damaged cache only costs a request.
func (s *store) networks() (out []storedNetwork, err error) {
	entries, err := os.ReadDir(s.Path("networks.d"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ztnode.ErrHomeUnusable, err)
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".conf")
		if !ok || len(name) != 16 {
			continue
		}
		id, err := vl2.ParseNetworkID(name)
		if err != nil {
			continue
		}
		n := storedNetwork{id: id}
		if fi, err := e.Info(); err == nil {
			n.at = fi.ModTime()
		}
		b, err := os.ReadFile(s.Path("networks.d", e.Name()))
		if err == nil && len(b) <= maxCachedConfig {
			if cfg, err := vl2.DecodeNetworkConfig(b); err == nil && cfg.ID == id {
				n.config = cfg
			}
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b storedNetwork) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.id, b.id)) })
	return out, nil
}

// maxCachedConfig bounds what is read back (chapter 03 §10, max dictionary).
const maxCachedConfig = 484519

func (s *store) networkPath(id vl2.NetworkID) string {
	return s.Path("networks.d", id.String()+".conf")
}

// storeNetwork remembers that the network is joined, with its configuration if
// there is one.
func (s *store) storeNetwork(id vl2.NetworkID, cfg *vl2.NetworkConfig) error {
	content := []byte("\n")
	if cfg != nil {
		content = cfg.Encode()
	} else if _, err := os.Stat(s.networkPath(id)); err == nil {
		return nil // keep the cached configuration
	}
	return atomicfile.Write(s.networkPath(id), content, 0o600)
}

func (s *store) removeNetwork(id vl2.NetworkID) error {
	for _, p := range []string{s.networkPath(id), s.Path("networks.d", id.String()+".local.conf")} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget network %s: %w", id, err)
		}
	}
	return nil
}
