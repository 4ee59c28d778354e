package zerotier

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ztgate/internal/atomicfile"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// Errors of [New] that name a cause an operator can remedy.
var (
	ErrHomeUnusable        = errors.New("home directory unusable")
	ErrHomeInUse           = errors.New("home directory is in use by another process")
	ErrIdentityPermissions = errors.New("identity file can be read by others")
	ErrIdentityMismatch    = errors.New("identity files do not match")
	ErrIdentityInvalid     = errors.New("identity invalid")
	ErrPlanetInvalid       = errors.New("planet file invalid")
)

// home is a directory in the format of a ZeroTier home (chapter 04 §16). Files
// it doesn't know are left alone.
type home struct {
	dir  string
	lock *os.File
}

// openHome creates dir if needed and takes its lock, so that two processes never
// share one identity.
func openHome(dir string) (*home, error) {
	if dir == "" {
		return nil, fmt.Errorf("%w: no directory given", ErrHomeUnusable)
	}
	for _, d := range []string{dir, filepath.Join(dir, "networks.d"), filepath.Join(dir, "moons.d"), filepath.Join(dir, "peers.d")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
		}
	}
	lock, err := os.OpenFile(filepath.Join(dir, "ztgate.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	if err := lockFile(lock); err != nil {
		lock.Close()
		return nil, fmt.Errorf("%w: %s: stop the other process or choose another --home", ErrHomeInUse, dir)
	}
	return &home{dir: dir, lock: lock}, nil
}

func (h *home) close() error { return h.lock.Close() }

func (h *home) path(elem ...string) string {
	return filepath.Join(append([]string{h.dir}, elem...)...)
}

// identity loads identity.secret, or makes a new identity if the home has none.
func (h *home) identity() (*identity.Identity, error) {
	secretPath, publicPath := h.path("identity.secret"), h.path("identity.public")
	fi, err := os.Stat(secretPath)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(publicPath); err == nil {
			return nil, fmt.Errorf("%w: %s exists without %s: restore the secret file, or remove the public one to get a new identity",
				ErrIdentityMismatch, publicPath, secretPath)
		}
		return h.newIdentity(secretPath, publicPath)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", ErrIdentityInvalid, secretPath)
	}
	if perm := fi.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("%w: %s has mode %04o: chmod 600 %[2]s", ErrIdentityPermissions, secretPath, perm)
	}
	text, err := os.ReadFile(secretPath)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	id, err := identity.Parse(string(text))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w: restore it from a backup, or move it away to get a new identity", ErrIdentityInvalid, secretPath, err)
	}
	if !id.HasSecret() {
		return nil, fmt.Errorf("%w: %s holds no secret key: restore it from a backup", ErrIdentityInvalid, secretPath)
	}
	if err := id.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w: restore it from a backup", ErrIdentityInvalid, secretPath, err)
	}
	return id, h.checkPublic(id, publicPath)
}

func (h *home) newIdentity(secretPath, publicPath string) (*identity.Identity, error) {
	id, err := identity.Generate(nil)
	if err != nil {
		return nil, fmt.Errorf("generate identity: %w", err)
	}
	if err := atomicfile.Write(secretPath, []byte(id.SecretString()), 0o600); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	if err := atomicfile.Write(publicPath, []byte(id.String()), 0o644); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	return id, nil
}

// checkPublic compares identity.public with the secret one; a missing file is
// written again, a different one is never overwritten.
func (h *home) checkPublic(id *identity.Identity, path string) error {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := atomicfile.Write(path, []byte(id.String()), 0o644); err != nil {
			return fmt.Errorf("%w: %w", ErrHomeUnusable, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	if pub, err := identity.Parse(string(text)); err != nil || !pub.Equal(id) {
		return fmt.Errorf("%w: %s does not belong to identity.secret (address %s): restore the pair from a backup, or remove the public file",
			ErrIdentityMismatch, path, id.Address())
	}
	return nil
}

// planet returns the stored planet. Without one it stores and returns given, or
// the built-in planet if given is nil.
func (h *home) planet(given []byte) (*vl1.World, error) {
	b, err := os.ReadFile(h.path("planet"))
	switch {
	case err == nil:
		w, _, err := vl1.ParseWorld(b)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w: replace it by the planet file of your network, or remove it to use the default",
				ErrPlanetInvalid, h.path("planet"), err)
		}
		if given != nil {
			return h.replacePlanet(w, given)
		}
		return w, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	if given == nil {
		return vl1.DefaultPlanet(), nil
	}
	w, _, err := vl1.ParseWorld(given)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPlanetInvalid, err)
	}
	return w, h.storePlanet(w)
}

// replacePlanet decides between the stored planet and one given by the
// operator: another planet wins, of the same one the newer revision wins.
func (h *home) replacePlanet(stored *vl1.World, given []byte) (*vl1.World, error) {
	w, _, err := vl1.ParseWorld(given)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPlanetInvalid, err)
	}
	if w.ID == stored.ID && w.Timestamp <= stored.Timestamp {
		return stored, nil
	}
	return w, h.storePlanet(w)
}

func (h *home) storePlanet(w *vl1.World) error {
	return atomicfile.Write(h.path("planet"), w.Append(nil), 0o644)
}

// moons reads the moons that are orbited (chapter 02 §3.6). A damaged file is
// reported and left alone.
func (h *home) moons() (out []*vl1.World, err error) {
	entries, err := os.ReadDir(h.path("moons.d"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	var errs []error
	for _, e := range entries {
		id, ok := vl1.ParseMoonFile(e.Name())
		if !ok {
			continue
		}
		b, err := os.ReadFile(h.path("moons.d", e.Name()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		w, _, err := vl1.ParseWorld(b)
		if err == nil && (!w.Moon || w.ID != id) {
			err = errors.New("it holds another world")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("moon %s: %w", h.path("moons.d", e.Name()), err))
			continue
		}
		out = append(out, w)
	}
	return out, errors.Join(errs...)
}

func (h *home) storeMoon(w *vl1.World) error {
	return atomicfile.Write(h.path("moons.d", vl1.MoonFile(w.ID)), w.Append(nil), 0o644)
}

func (h *home) removeMoon(id uint64) error {
	if err := os.Remove(h.path("moons.d", vl1.MoonFile(id))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget moon %016x: %w", id, err)
	}
	return nil
}

// peer looks a peer up in the cache (chapter 02 §4.11); nil if it isn't there.
func (h *home) peer(a identity.Address) *vl1.PeerRecord {
	b, err := os.ReadFile(h.path("peers.d", vl1.PeerFile(a)))
	if err != nil {
		return nil
	}
	r, err := vl1.ParsePeerRecord(b)
	if err != nil || r.Identity.Address() != a {
		return nil
	}
	return r
}

// latestPeers lists peers of the cache, at most limit, those written last first.
func (h *home) latestPeers(limit int) []identity.Address {
	entries, err := os.ReadDir(h.path("peers.d"))
	if err != nil {
		return nil // the cache is a help, not a need
	}
	type file struct {
		peer    identity.Address
		written time.Time
	}
	var files []file
	for _, e := range entries {
		if a, ok := vl1.ParsePeerFile(e.Name()); ok {
			if info, err := e.Info(); err == nil {
				files = append(files, file{a, info.ModTime()})
			}
		}
	}
	slices.SortFunc(files, func(a, b file) int { return b.written.Compare(a.written) })
	var out []identity.Address
	for _, f := range files[:min(len(files), limit)] {
		out = append(out, f.peer)
	}
	return out
}

func (h *home) storePeer(r vl1.PeerRecord) error {
	return atomicfile.Write(h.path("peers.d", vl1.PeerFile(r.Identity.Address())), r.Append(nil), 0o600)
}

// networks lists the networks to join, with the cached configuration where one
// can be read (chapter 03 §1.7). A damaged cache only costs a request.
func (h *home) networks() (map[vl2.NetworkID]*vl2.NetworkConfig, error) {
	entries, err := os.ReadDir(h.path("networks.d"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHomeUnusable, err)
	}
	out := make(map[vl2.NetworkID]*vl2.NetworkConfig)
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".conf")
		if !ok || len(name) != 16 {
			continue
		}
		id, err := vl2.ParseNetworkID(name)
		if err != nil {
			continue
		}
		out[id] = nil
		b, err := os.ReadFile(h.path("networks.d", e.Name()))
		if err != nil || len(b) > maxCachedConfig {
			continue
		}
		if cfg, err := vl2.DecodeNetworkConfig(b); err == nil && cfg.ID == id {
			out[id] = cfg
		}
	}
	return out, nil
}

// maxCachedConfig bounds what is read back (chapter 03 §10, max dictionary).
const maxCachedConfig = 484519

func (h *home) networkPath(id vl2.NetworkID) string {
	return h.path("networks.d", id.String()+".conf")
}

// storeNetwork remembers that the network is joined, with its configuration if
// there is one.
func (h *home) storeNetwork(id vl2.NetworkID, cfg *vl2.NetworkConfig) error {
	content := []byte("\n")
	if cfg != nil {
		content = cfg.Encode()
	} else if _, err := os.Stat(h.networkPath(id)); err == nil {
		return nil // keep the cached configuration
	}
	return atomicfile.Write(h.networkPath(id), content, 0o600)
}

func (h *home) removeNetwork(id vl2.NetworkID) error {
	for _, p := range []string{h.networkPath(id), h.path("networks.d", id.String()+".local.conf")} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget network %s: %w", id, err)
		}
	}
	return nil
}
