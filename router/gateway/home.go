package gateway

import (
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"ztgate/internal/atomicfile"
	"ztgate/internal/disk"
	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier/identity"
)

// prepare makes home and puts a configured identity there. It returns the
// configured planet.
func prepare(cfg *config.Config) (planet []byte, err error) {
	if err := os.MkdirAll(cfg.Home, 0o700); err != nil {
		return nil, fault.Usagef("home %q: %w: choose another with --home", cfg.Home, err)
	}
	if err := storeIdentity(cfg); err != nil {
		return nil, err
	}
	if cfg.Planet == "" {
		return nil, nil
	}
	if planet, err = os.ReadFile(cfg.Planet); err != nil {
		return nil, fault.Usagef("planet (from %s): %w", cfg.Origin("planet"), err)
	}
	return planet, nil
}

// storeIdentity puts the configured identity into home. One that is there
// already is never replaced.
func storeIdentity(cfg *config.Config) error {
	if cfg.IdentitySecret == "" {
		return nil
	}
	from := cfg.Origin("identity.secret")
	id, err := identity.Parse(cfg.IdentitySecret)
	switch {
	case err != nil:
		return fault.Usagef("identity.secret (from %s): %w", from, err)
	case !id.HasSecret():
		return fault.Usagef("identity.secret (from %s): holds no secret key: give the content of identity.secret", from)
	}
	if cfg.IdentityPublic != "" {
		if pub, err := identity.Parse(cfg.IdentityPublic); err != nil || !pub.Public().Equal(id.Public()) {
			return fault.Usagef("identity.public (from %s): does not belong to identity.secret", cfg.Origin("identity.public"))
		}
	}
	path := filepath.Join(cfg.Home, "identity.secret")
	old, err := os.ReadFile(path)
	switch {
	case err == nil && strings.TrimSpace(string(old)) == id.SecretString():
		return nil
	case err == nil:
		return fault.Usagef("identity.secret (from %s): %s holds another identity: remove one of the two", from, path)
	case !errors.Is(err, os.ErrNotExist):
		return fault.Usagef("identity.secret: %w", err)
	}
	if err := atomicfile.Write(path, []byte(id.SecretString()), 0o600); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(cfg.Home, "identity.public"), []byte(id.String()), 0o644)
}

// natSeed keys the choice of external ports, so that it is the same after a
// restart and nobody else can guess it.
func natSeed(on disk.FS, home string) [32]byte {
	secret, err := on.ReadFile(filepath.Join(home, "identity.secret"))
	if err != nil {
		return [32]byte{} // the plane then takes a random one
	}
	return sha256.Sum256(append([]byte("ztgate nat ports\n"), secret...))
}
