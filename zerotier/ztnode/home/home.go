// Package home opens the directory that holds a node's state, in the format of a
// ZeroTier home (chapter 04 §16). It checks what all implementations of a node need of
// it, its lock, identity and planet, and says the same about what is wrong with them.
// The rest of the directory is the node's affair.
package home

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"ztgate/internal/atomicfile"
	"ztgate/internal/disk"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

// Dir is a home that this process alone uses.
type Dir struct {
	Disk disk.FS
	path string
	lock io.Closer
}

// Open creates a home if needed and takes its lock, so that two processes never share
// one identity.
func Open(path string) (*Dir, error) { return OpenOn(nil, path) }

// OpenOn is [Open] on another disk; nil = the machine's.
func OpenOn(on disk.FS, path string) (*Dir, error) {
	if path == "" {
		return nil, fmt.Errorf("%w: no directory given", ztnode.ErrHomeUnusable)
	}
	on = disk.Or(on)
	for _, d := range []string{"", "networks.d", "moons.d", "peers.d"} {
		if err := on.MkdirAll(filepath.Join(path, d), 0o700); err != nil {
			return nil, unusable(err)
		}
	}
	lock, err := on.Lock(filepath.Join(path, "ztgate.lock"))
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		return nil, unusable(err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: stop the other process or choose another --home", ztnode.ErrHomeInUse, path)
	}
	// What a process that was killed had not made durable yet is read now, and not
	// written again.
	for _, d := range []string{"", "networks.d", "moons.d"} {
		if err := on.SyncDir(filepath.Join(path, d)); err != nil {
			return nil, errors.Join(unusable(err), lock.Close())
		}
	}
	return &Dir{on, path, lock}, nil
}

func unusable(err error) error { return fmt.Errorf("%w: %w", ztnode.ErrHomeUnusable, err) }

// Close gives up the lock.
func (d *Dir) Close() error { return d.lock.Close() }

// Path returns the path of a file in the home.
func (d *Dir) Path(elem ...string) string {
	return filepath.Join(append([]string{d.path}, elem...)...)
}

func (d *Dir) secretPath() string { return d.Path("identity.secret") }
func (d *Dir) publicPath() string { return d.Path("identity.public") }
func (d *Dir) planetPath() string { return d.Path("planet") }

// Identity reads and checks the identity; nil if the home has none yet. A missing
// identity.public is written again.
func (d *Dir) Identity() (*identity.Identity, error) {
	fi, err := d.Disk.Stat(d.secretPath())
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := d.Disk.Stat(d.publicPath()); err == nil {
			return nil, fmt.Errorf("%w: %s exists without %s: restore the secret file, or remove the public one to get a new identity",
				ztnode.ErrIdentityMismatch, d.publicPath(), d.secretPath())
		}
		return nil, nil
	}
	if err != nil {
		return nil, unusable(err)
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", ztnode.ErrIdentityInvalid, d.secretPath())
	}
	if perm := fi.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("%w: %s has mode %04o: chmod 600 %[2]s", ztnode.ErrIdentityPermissions, d.secretPath(), perm)
	}
	text, err := d.Disk.ReadFile(d.secretPath())
	if err != nil {
		return nil, unusable(err)
	}
	id, err := identity.Parse(string(text))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w: restore it from a backup, or move it away to get a new identity", ztnode.ErrIdentityInvalid, d.secretPath(), err)
	}
	if !id.HasSecret() {
		return nil, fmt.Errorf("%w: %s holds no secret key: restore it from a backup", ztnode.ErrIdentityInvalid, d.secretPath())
	}
	if err := id.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w: restore it from a backup", ztnode.ErrIdentityInvalid, d.secretPath(), err)
	}
	return id, d.checkPublic(id)
}

// checkPublic compares identity.public with the secret one; a different one is never
// overwritten.
func (d *Dir) checkPublic(id *identity.Identity) error {
	text, err := d.Disk.ReadFile(d.publicPath())
	if errors.Is(err, fs.ErrNotExist) {
		return d.storePublic(id)
	}
	if err != nil {
		return unusable(err)
	}
	if pub, err := identity.Parse(string(text)); err != nil || !pub.Equal(id) {
		return fmt.Errorf("%w: %s does not belong to identity.secret (address %s): restore the pair from a backup, or remove the public file",
			ztnode.ErrIdentityMismatch, d.publicPath(), id.Address())
	}
	return nil
}

// StoreIdentity writes the files of a new identity.
func (d *Dir) StoreIdentity(id *identity.Identity) error {
	if err := atomicfile.WriteOn(d.Disk, d.secretPath(), []byte(id.SecretString()), 0o600); err != nil {
		return unusable(err)
	}
	return d.storePublic(id)
}

func (d *Dir) storePublic(id *identity.Identity) error {
	if err := atomicfile.WriteOn(d.Disk, d.publicPath(), []byte(id.String()), 0o644); err != nil {
		return unusable(err)
	}
	return nil
}

// Planet returns the planet to use, nil for the built-in one. given is the operator's
// planet file, nil for none: it is stored unless the home has the same planet, as new
// or newer.
func (d *Dir) Planet(given []byte) (*vl1.World, error) {
	stored, err := d.storedPlanet()
	if err != nil || given == nil {
		return stored, err
	}
	w, err := parsePlanet(given)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ztnode.ErrPlanetInvalid, err)
	}
	if stored != nil && w.ID == stored.ID && w.Timestamp <= stored.Timestamp {
		return stored, nil
	}
	return w, d.StorePlanet(w)
}

func (d *Dir) storedPlanet() (*vl1.World, error) {
	b, err := d.Disk.ReadFile(d.planetPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, unusable(err)
	}
	w, err := parsePlanet(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w: replace it by the planet file of your network, or remove it to use the default",
			ztnode.ErrPlanetInvalid, d.planetPath(), err)
	}
	return w, nil
}

func parsePlanet(b []byte) (*vl1.World, error) {
	w, _, err := vl1.ParseWorld(b)
	if err == nil && !w.IsPlanet() {
		err = errors.New("it holds a moon")
	}
	return w, err
}

// StorePlanet replaces the planet.
func (d *Dir) StorePlanet(w *vl1.World) error {
	return atomicfile.WriteOn(d.Disk, d.planetPath(), w.Append(nil), 0o644)
}
