package admin

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"ztgate/internal/atomicfile"
	"ztgate/internal/disk"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode/home"
)

const (
	recordsDir   = "controller.d"
	secretFile   = "identity.secret"
	publicFile   = "identity.public"
	planetFile   = "planet"
	importSuffix = ".import"
)

// Migration says what was moved from one controller to another, and what wasn't.
type Migration struct {
	Schema   int      `json:"schema"`
	Address  string   `json:"address"` // of both controllers
	To       string   `json:"to"`
	Networks int      `json:"networks"`
	Members  int      `json:"members"`
	Identity string   `json:"identity"` // taken, kept or written
	Notes    []string `json:"notes"`    // what has no counterpart, and what is left to be done
}

func (m *Migration) notef(format string, args ...any) {
	m.Notes = append(m.Notes, fmt.Sprintf(format, args...))
}

// ImportController makes the networks of a controller of zerotier-one ours: dir is its
// home, or its controller.d, to is ours, which no process uses and whose controller has
// no network yet. All is taken or nothing.
func ImportController(dir, to string) (Migration, error) { return importOn(disk.OS{}, dir, to) }

// importOn is ImportController for a home on another disk.
func importOn(on disk.FS, dir, to string) (Migration, error) {
	m := Migration{Schema: control.Schema, To: to, Notes: []string{}}
	from, err := findRecords(dir)
	if err != nil {
		return m, err
	}
	if err := stopped(from.home); err != nil {
		return m, err
	}
	id, err := readSecret(from)
	if err != nil {
		return m, err
	}
	all, err := controller.ReadArchive(nil, from.records)
	if err != nil {
		return m, fault.Usagef("nothing is imported: %w: repair these files, or move them away to leave them out", err)
	}
	h, err := home.OpenOn(on, to)
	if err != nil {
		return m, fault.Usage(err)
	}
	defer h.Close()
	own, err := h.Identity()
	switch {
	case err != nil:
		return m, fault.Usage(err)
	case own == nil && id == nil:
		return m, fault.Usagef("%s has no %s, and neither has %s: networks belong to the identity of their controller: give its home", from.home, secretFile, to)
	case own != nil && id != nil && !own.Equal(id):
		return m, fault.Usagef("%s has identity %s, %s has %s: networks belong to the identity of their controller: choose an empty home with --home",
			to, own.Address(), from.home, id.Address())
	case own == nil:
		own, m.Identity = id, "taken"
	default:
		id, m.Identity = nil, "kept"
	}
	m.Address = own.Address().String()
	mine, err := m.fit(all, own)
	if err != nil {
		return m, err
	}
	m.notePlanet(from.home, to)
	if err := emptied(h, filepath.Join(to, recordsDir)); err != nil {
		return m, err
	}
	if id != nil {
		if err := h.StoreIdentity(id); err != nil {
			return m, err
		}
	}
	return m, place(mine, h, to)
}

// fit takes what is the controller's own, in our form.
func (m *Migration) fit(all controller.Archive, own *identity.Identity) (controller.Archive, error) {
	mine, others := all.Of(own.Address())
	for _, id := range others {
		m.notef("network %s is left out: it belongs to controller %s, and this one never served it", id, id.Controller())
	}
	if len(mine.Networks) == 0 {
		return mine, fault.Usagef("nothing is imported: there is no network of controller %s", own.Address())
	}
	notes, err := mine.Fit()
	if err != nil {
		return mine, fault.Usagef("nothing is imported: %w", err)
	}
	m.Networks, m.Members = len(mine.Networks), len(mine.Members)
	m.Notes = append(m.Notes, notes...)
	return mine, nil
}

// notePlanet says if the two find their roots in different places.
func (m *Migration) notePlanet(from, to string) {
	theirs, err := os.ReadFile(filepath.Join(from, planetFile))
	ours, err2 := os.ReadFile(filepath.Join(to, planetFile))
	if err == nil && (err2 != nil || !bytes.Equal(theirs, ours)) {
		m.notef("the planet isn't copied: if %s has one of your own, copy it to %s", filepath.Join(from, planetFile), to)
	}
}

// emptied makes room for records where there are none.
func emptied(h *home.Dir, dir string) error {
	old, err := controller.ReadArchive(h.Disk, dir)
	if err != nil || len(old.Networks) > 0 {
		return fault.Usagef("nothing is imported: %s has %d networks already: choose an empty home with --home, or move them away", dir, len(old.Networks))
	}
	for _, d := range []string{filepath.Join(dir, "network"), dir} {
		if err := h.Disk.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fault.Usagef("nothing is imported: %w: move away what is there", err)
		}
	}
	return nil
}

// place writes records beside their place and moves them there at once.
func place(a controller.Archive, h *home.Dir, to string) error {
	dir := filepath.Join(to, recordsDir)
	beside := dir + importSuffix
	err := h.Disk.RemoveAll(beside) // of a run that was killed
	if err == nil {
		err = a.Write(h.Disk, beside)
	}
	if err == nil {
		err = h.Disk.Rename(beside, dir)
	}
	if err == nil {
		err = h.Disk.SyncDir(to)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("nothing is imported: %w", err), h.Disk.RemoveAll(beside))
	}
	return nil
}

// layout is where a controller has its things.
type layout struct{ home, records string }

// findRecords takes a home, or the directory of the records themselves.
func findRecords(dir string) (layout, error) {
	for _, l := range []layout{{dir, filepath.Join(dir, recordsDir)}, {filepath.Dir(filepath.Clean(dir)), dir}} {
		if fi, err := os.Stat(filepath.Join(l.records, "network")); err == nil && fi.IsDir() {
			return l, nil
		}
	}
	return layout{}, fault.Usagef("%s: neither the home of a controller nor its %s: there is no network in it", dir, recordsDir)
}

// stopped refuses the home of a zerotier-one that runs: what it stores would be lost, and
// two nodes would share its identity.
func stopped(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "zerotier-one.pid"))
	if err != nil {
		return nil // removed at its end
	}
	pid := strings.TrimSpace(string(b))
	name, err := os.ReadFile(filepath.Join("/proc", filepath.Base(pid), "comm"))
	if err == nil && strings.TrimSpace(string(name)) == "zerotier-one" {
		return fault.Usagef("nothing is imported: zerotier-one runs in %s (process %s): stop it first", dir, pid)
	}
	return nil
}

// readSecret reads the identity of the other controller, nil if there is none.
func readSecret(from layout) (*identity.Identity, error) {
	path := filepath.Join(from.home, secretFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Usage(err)
	}
	id, err := identity.Parse(strings.TrimSpace(string(b)))
	if err == nil {
		err = id.Validate()
	}
	if err == nil && !id.HasSecret() {
		err = errors.New("holds no secret key")
	}
	if err != nil {
		return nil, fault.Usagef("%s: %w", path, err)
	}
	return id, nil
}

// ExportController writes our controller's networks as a home of zerotier-one, which
// must not exist yet or be empty. A running process may go on meanwhile.
func ExportController(from, dir string) (Migration, error) {
	m, err := export(from, dir)
	if err == nil {
		err = disk.OS{}.SyncDir(filepath.Dir(filepath.Clean(dir)))
	}
	return m, err
}

func export(from, dir string) (m Migration, err error) {
	m = Migration{Schema: control.Schema, To: dir, Identity: "written", Notes: []string{}}
	l := layout{from, filepath.Join(from, recordsDir)}
	id, err := readSecret(l)
	switch {
	case err != nil:
		return m, err
	case id == nil:
		return m, fault.Usagef("%s has no %s: give the home of the controller with --home", from, secretFile)
	}
	m.Address = id.Address().String()
	a, err := controller.ReadArchive(nil, l.records)
	if err != nil {
		return m, fmt.Errorf("nothing is exported: %w", err)
	}
	m.Networks, m.Members = len(a.Networks), len(a.Members)
	if err := mayFill(dir); err != nil {
		return m, err
	}
	beside, err := os.MkdirTemp(filepath.Dir(filepath.Clean(dir)), ".ztgate-export-*") // 0700
	if err != nil {
		return m, fault.Usage(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("nothing is exported: %w", err), os.RemoveAll(beside))
		}
	}()
	if err := a.Write(nil, filepath.Join(beside, recordsDir)); err != nil {
		return m, err
	}
	files := map[string]struct {
		text []byte
		mode fs.FileMode
	}{secretFile: {[]byte(id.SecretString()), 0o600}, publicFile: {[]byte(id.Public().String()), 0o644}}
	if planet, err := os.ReadFile(filepath.Join(from, planetFile)); err == nil {
		files[planetFile] = struct {
			text []byte
			mode fs.FileMode
		}{planet, 0o644}
	}
	for name, f := range files {
		if err := atomicfile.Write(filepath.Join(beside, name), f.text, f.mode); err != nil {
			return m, err
		}
	}
	m.noteClock(a, l.records)
	m.notef("stop this controller before the other one starts: two nodes must not share an identity")
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	return m, os.Rename(beside, dir)
}

// noteClock says if members would refuse what the other controller gives out for a
// while, since certificates of ours are newer.
func (m *Migration) noteClock(a controller.Archive, records string) {
	last := time.UnixMilli(a.LastTimestamp(nil, records))
	if now := time.Now(); last.After(now.Add(2 * time.Minute)) {
		m.notef("time stamps up to %s were given out: members refuse older ones until then", last.UTC().Format(time.DateTime))
	}
}

// mayFill refuses a directory that has something in it.
func mayFill(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case err == nil && len(entries) > 0:
		return fault.Usagef("%s isn't empty: choose a new directory", dir)
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fault.Usage(err)
}
