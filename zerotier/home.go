package zerotier

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
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
type store struct {
	*home.Dir
	now    func() time.Time
	cached peerFiles
}

func newStore(dir *home.Dir, now func() time.Time) *store {
	return &store{Dir: dir, now: now, cached: peerFiles{m: make(map[identity.Address]time.Time), most: maxPeerFiles}}
}

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
	entries, err := s.Disk.ReadDir(s.Path("moons.d"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ztnode.ErrHomeUnusable, err)
	}
	var errs []error
	for _, e := range entries {
		id, ok := vl1.ParseMoonFile(e.Name())
		if !ok {
			continue
		}
		b, err := s.Disk.ReadFile(s.Path("moons.d", e.Name()))
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
	return atomicfile.WriteOn(s.Disk, s.Path("moons.d", vl1.MoonFile(w.ID)), w.Append(nil), 0o644)
}

func (s *store) removeMoon(id uint64) error {
	if err := s.Disk.Remove(s.Path("moons.d", vl1.MoonFile(id))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget moon %016x: %w", id, err)
	}
	return nil
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
	entries, err := s.Disk.ReadDir(s.Path("networks.d"))
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
		b, err := s.Disk.ReadFile(s.Path("networks.d", e.Name()))
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

// maxCachedConfig bounds what is read back.
const maxCachedConfig = vl2.MaxConfig

func (s *store) networkPath(id vl2.NetworkID) string {
	return s.Path("networks.d", id.String()+".conf")
}

// rememberNetwork remembers that the network is joined. A cached configuration is kept.
func (s *store) rememberNetwork(id vl2.NetworkID) error {
	if _, err := s.Disk.Stat(s.networkPath(id)); err == nil {
		return nil
	}
	return atomicfile.WriteOn(s.Disk, s.networkPath(id), []byte("\n"), 0o600)
}

// storeNetwork keeps the configuration of a network that is remembered: one that comes
// while the network is left must not make it joined again.
func (s *store) storeNetwork(id vl2.NetworkID, cfg *vl2.NetworkConfig) error {
	if _, err := s.Disk.Stat(s.networkPath(id)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return atomicfile.WriteOn(s.Disk, s.networkPath(id), cfg.Encode(), 0o600)
}

func (s *store) removeNetwork(id vl2.NetworkID) error {
	for _, p := range []string{s.networkPath(id), s.Path("networks.d", id.String()+".local.conf")} {
		if err := s.Disk.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget network %s: %w", id, err)
		}
	}
	return nil
}
