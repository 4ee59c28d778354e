package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"ztgate/internal/atomicfile"
	"ztgate/internal/disk"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

const (
	fileMode = 0o600
	dirMode  = 0o700
)

// store keeps the records in files (chapter 04 §10):
//
//	network/<16 hex>.json                  network record
//	network/<16 hex>.state                 ours: time stamps given out, revocations
//	network/<16 hex>/member/<10 hex>.json  member record
type store struct {
	disk disk.FS
	dir  string
}

func (s store) networks() string { return filepath.Join(s.dir, "network") }
func (s store) networkPath(n vl2.NetworkID) string {
	return filepath.Join(s.networks(), n.String()+".json")
}
func (s store) statePath(n vl2.NetworkID) string {
	return filepath.Join(s.networks(), n.String()+".state")
}
func (s store) memberDir(n vl2.NetworkID) string {
	return filepath.Join(s.networks(), n.String(), "member")
}
func (s store) memberPath(n vl2.NetworkID, a identity.Address) string {
	return filepath.Join(s.memberDir(n), a.String()+".json")
}

// init creates the directory, for nobody else to read.
func (s store) init() error {
	if err := s.disk.MkdirAll(s.networks(), dirMode); err != nil {
		return fmt.Errorf("create controller directory: %w", err)
	}
	if err := s.disk.Chmod(s.dir, dirMode); err != nil {
		return fmt.Errorf("create controller directory: %w", err)
	}
	return nil
}

// names lists the records in a directory and removes what an interrupted write
// left there. What a process that was killed could not finish to make durable becomes
// so: nothing that is read is written again to be known as done.
func (s store) names(dir, suffix string, length int) (names []string, err error) {
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := s.syncDir(d); err != nil {
			return nil, err
		}
	}
	entries, err := s.disk.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read controller directory: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		switch {
		case strings.HasPrefix(name, ".") && (strings.Contains(name, ".json.") || strings.Contains(name, ".state.")):
			if err := s.disk.Remove(filepath.Join(dir, name)); err != nil {
				return nil, fmt.Errorf("remove unfinished file: %w", err)
			}
		case strings.HasSuffix(name, suffix) && len(name) == length+len(suffix):
			names = append(names, strings.TrimSuffix(name, suffix))
		}
	}
	return names, nil
}

// readRecord decodes a file into v.
func (s store) readRecord(path string, v any) error {
	b, err := s.disk.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// writeRecord writes v so that it is on disk when it returns.
func (s store) writeRecord(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return atomicfile.WriteOn(s.disk, path, b, fileMode)
}

// addNetwork makes the directories of a new network and its record. Members of a
// deleted network with that ID that are still there must not come back.
func (s store) addNetwork(n *Network) error {
	if err := s.removeTree(n.ID); err != nil {
		return err
	}
	if err := s.disk.MkdirAll(s.memberDir(n.ID), dirMode); err != nil {
		return fmt.Errorf("create network directory: %w", err)
	}
	if err := s.syncDir(filepath.Dir(s.memberDir(n.ID))); err != nil {
		return err
	}
	return s.writeRecord(s.networkPath(n.ID), n) // syncs the parent too
}

func (s store) removeNetwork(n vl2.NetworkID) error {
	if err := s.disk.Remove(s.networkPath(n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network: %w", err)
	}
	if err := s.syncDir(s.networks()); err != nil {
		return err
	}
	return s.removeTree(n)
}

func (s store) removeTree(n vl2.NetworkID) error {
	if err := s.disk.RemoveAll(filepath.Dir(s.memberDir(n))); err != nil {
		return fmt.Errorf("remove network: %w", err)
	}
	if err := s.disk.Remove(s.statePath(n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network: %w", err)
	}
	return nil
}

func (s store) writeMember(m *Member) error {
	if err := s.disk.MkdirAll(s.memberDir(m.Network), dirMode); err != nil {
		return fmt.Errorf("create network directory: %w", err)
	}
	return s.writeRecord(s.memberPath(m.Network, m.Address), m)
}

func (s store) removeMember(n vl2.NetworkID, a identity.Address) error {
	if err := s.disk.Remove(s.memberPath(n, a)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove member: %w", err)
	}
	return s.syncDir(s.memberDir(n))
}

// syncDir makes removals in dir durable.
func (s store) syncDir(dir string) error {
	if err := s.disk.SyncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
