package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"ztgate/internal/atomicfile"
	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// memoryFile is where home remembers the configuration that was in force last.
const memoryFile = "ztgate-configured.json"

// homeMemory is what home remembers of the configuration: what is gone from it since
// must not be taken for something that was never there.
type homeMemory struct {
	path string

	mu   sync.Mutex // guards what follows; writes a file
	kept remembered
}

type remembered struct {
	// File is the configuration file that was read, "" if there was none.
	File string `json:"configurationFile"`
	// Networks are those that the file named.
	Networks []ztnode.NetworkID `json:"networks,omitempty"`
	// Joined are those that were joined by command, whatever the file says, in that
	// order.
	Joined []ztnode.NetworkID `json:"joined,omitempty"`
}

// remember reads the memory of a home. A faulty one is an error: it may have known
// that something is missing.
func remember(home string) (*homeMemory, error) {
	m := &homeMemory{path: filepath.Join(home, memoryFile)}
	b, err := os.ReadFile(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &m.kept)
	}
	if err != nil {
		return nil, fault.Usagef("%s: %w: remove it to forget which configuration was in force", m.path, err)
	}
	return m, nil
}

// missing says that the configuration file of the last start isn't there any more.
// Its policy would be, too.
func (m *homeMemory) missing(cfg *config.Config) error {
	file, given := cfg.File()
	if m.kept.File == "" || file != "" || given {
		return nil
	}
	why := "is gone"
	if _, err := os.Stat(m.kept.File); err == nil {
		why = "isn't read any more, or is empty"
	}
	return fault.Usagef("configuration file %s was in force at the last start and %s: restore it, or start with --config= to go on without a file",
		m.kept.File, why)
}

// gone lists the networks that only the file named, and that a configuration doesn't
// name any more. A nil memory knows none.
func (m *homeMemory) gone(cfg *config.Config) (out []ztnode.NetworkID) {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	now := cfg.NetworkIDs()
	for _, id := range m.kept.Networks {
		if !slices.Contains(now, id) && !slices.Contains(m.kept.Joined, id) {
			out = append(out, id)
		}
	}
	return out
}

// keep remembers a configuration that is in force.
func (m *homeMemory) keep(cfg *config.Config) error {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	next := remembered{Joined: m.kept.Joined}
	next.File, _ = cfg.File()
	if strings.HasPrefix(cfg.Origin("networks"), "file ") {
		next.Networks = cfg.NetworkIDs()
	}
	return m.write(next)
}

// joined lists the networks that were joined by command, the first one first. A nil
// memory knows none.
func (m *homeMemory) joined() []ztnode.NetworkID {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.kept.Joined
}

// join remembers that a network was joined, or left, by command. One that is joined
// again keeps its place.
func (m *homeMemory) join(id ztnode.NetworkID, joined bool) error {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.kept
	switch i := slices.Index(m.kept.Joined, id); {
	case joined == (i >= 0):
		return nil
	case joined:
		next.Joined = append(slices.Clone(m.kept.Joined), id)
	default:
		next.Joined = slices.Delete(slices.Clone(m.kept.Joined), i, i+1)
	}
	return m.write(next)
}

func (m *homeMemory) write(next remembered) error {
	b, err := json.Marshal(next)
	if err != nil {
		return err
	}
	// What is remembered already needs no disk, which may be full.
	if old, err := json.Marshal(m.kept); err == nil && bytes.Equal(b, old) {
		return nil
	}
	if err := atomicfile.Write(m.path, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("remember the configuration: %w", err)
	}
	m.kept = next
	return nil
}
