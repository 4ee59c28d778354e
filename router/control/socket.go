package control

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"ztgate/router/config"
)

// ListenSockets opens the control socket: the configured one, or the default one
// and one inside home, by which a command with --home finds this process among
// several.
func ListenSockets(cfg *config.Config) ([]net.Listener, error) {
	paths := []string{cfg.Socket}
	if cfg.Socket == "" {
		paths = []string{config.DefaultSocket, homeSocket(cfg.Home)}
	}
	var out []net.Listener
	var errs []error
	for _, path := range paths {
		l, err := openSocket(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("open control socket %s: %w", path, err))
			continue
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return nil, errors.Join(errs...)
	}
	return out, nil
}

func homeSocket(home string) string { return filepath.Join(home, "ztgate.sock") }

var errSocketInUse = errors.New("another process answers on it: stop that one or choose another with --socket")

// maxSocketPath is what fits a unix socket address.
const maxSocketPath = 107

func openSocket(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("the path has %d bytes, %d are possible: choose a shorter one with --socket", len(path), maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	fi, err := os.Lstat(path)
	switch {
	case err == nil && fi.Mode()&os.ModeSocket == 0:
		return nil, errors.New("a file of another kind is there: remove it or choose another path with --socket")
	case err == nil:
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = c.Close()
			return nil, errSocketInUse
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
