// Package lab is the gateway's scenario on one machine, in network namespaces: a
// root with a controller, an office host with a web server, the gateway and a
// VPC client behind it. `ztgate lab`, the end-to-end tests and the benchmarks
// share it.
//
// [Topology] holds the namespaces and processes of one lab, [Run] is the
// scenario. It needs root; [CheckHost] says what is missing.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultPrefix begins the names of the namespaces.
const DefaultPrefix = "zglab"

const (
	runDir      = "/run"
	netnsDir    = "/run/netns"
	stopTimeout = 8 * time.Second
)

// Topology is one lab: namespaces and processes whose names begin with a prefix,
// and a directory for their files.
type Topology struct {
	Prefix string
	Dir    string // homes and sockets, removed by Close
	LogDir string // logs of the processes, not removed by Close

	lock   *os.File
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu         sync.Mutex
	namespaces []*Namespace
	processes  []*Process
}

// New takes the prefix for this process and removes what an earlier lab with the
// same prefix left behind. Processes started in the topology make ctx of
// [Topology.Context] end when they end unasked.
func New(ctx context.Context, prefix string) (*Topology, error) {
	if err := checkPrefix(prefix); err != nil {
		return nil, err
	}
	if err := CheckHost(); err != nil {
		return nil, err
	}
	lock, err := takeLock(prefix)
	if err != nil {
		return nil, err
	}
	t := &Topology{Prefix: prefix, Dir: dirOf(prefix), lock: lock}
	err = removeLeftovers(prefix)
	if err == nil {
		err = os.Mkdir(t.Dir, 0o700)
	}
	if err == nil {
		t.LogDir, err = os.MkdirTemp("", prefix+"-logs-")
	}
	if err != nil {
		releaseLock(prefix, lock)
		return nil, err
	}
	t.ctx, t.cancel = context.WithCancelCause(ctx)
	return t, nil
}

// Down removes the lab with this prefix, whoever left it. Nothing to remove is no
// error.
func Down(prefix string) error {
	if err := checkPrefix(prefix); err != nil {
		return err
	}
	if err := CheckHost(); err != nil {
		return err
	}
	lock, err := takeLock(prefix)
	if err != nil {
		return err
	}
	defer releaseLock(prefix, lock)
	return removeLeftovers(prefix)
}

// Context ends with the context of [New], or when a process ends unasked; its
// cause then says which one and why.
func (t *Topology) Context() context.Context { return t.ctx }

// Processes lists what was started, in that order.
func (t *Topology) Processes() []*Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.processes)
}

func dirOf(prefix string) string { return filepath.Join(runDir, prefix) }

// checkPrefix keeps the prefix fit for file names, away from other people's
// directories, and from being the beginning of another lab's names.
func checkPrefix(prefix string) error {
	ok := strings.HasPrefix(prefix, DefaultPrefix) && len(prefix) <= 32
	for _, c := range prefix {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9')
	}
	if !ok {
		return fmt.Errorf("lab prefix %q: want %s and then letters and digits", prefix, DefaultPrefix)
	}
	return nil
}

// ErrBusy says that another process runs a lab with the same prefix.
var ErrBusy = errors.New("another lab is running")

func lockPath(prefix string) string { return filepath.Join(runDir, prefix+".lock") }

func takeLock(prefix string) (*os.File, error) {
	path := lockPath(prefix)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open lock file: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			pid, _ := os.ReadFile(path)
			_ = f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("lock %s: %w, process %s", path, ErrBusy, bytes.TrimSpace(pid))
			}
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		mine, err1 := f.Stat()
		now, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(mine, now) {
			if err := f.Truncate(0); err == nil {
				_, _ = fmt.Fprintln(f, os.Getpid()) // for people
			}
			return f, nil
		}
		_ = f.Close() // its last owner removed it meanwhile
	}
}

func releaseLock(prefix string, f *os.File) {
	_ = os.Remove(lockPath(prefix))
	_ = f.Close()
}

// Namespace makes the namespace PREFIX-name.
func (t *Topology) Namespace(name string) (*Namespace, error) {
	n, err := newNamespace(t.Prefix + "-" + name)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	t.namespaces = append(t.namespaces, n)
	t.mu.Unlock()
	return n, nil
}

// Leave ends the work on the lab but leaves namespaces and processes as they
// are; [Down] or the next [New] removes them.
func (t *Topology) Leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.processes {
		p.release()
	}
	for _, n := range t.namespaces {
		n.close()
	}
	t.cancel(nil)
	releaseLock(t.Prefix, t.lock)
}

// Close stops the processes and removes everything but the logs.
func (t *Topology) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var stop sync.WaitGroup
	for _, p := range t.processes {
		stop.Go(p.Stop)
	}
	stop.Wait()
	for _, n := range t.namespaces {
		n.close()
	}
	t.cancel(nil)
	err := removeLeftovers(t.Prefix)
	releaseLock(t.Prefix, t.lock)
	return err
}

// removeLeftovers removes processes, namespaces and files of the prefix. Caller
// holds the lock.
func removeLeftovers(prefix string) error {
	var errs []error
	if err := stopLeftProcesses(dirOf(prefix)); err != nil {
		errs = append(errs, err)
	}
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("list network namespaces: %w", err))
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix+"-") {
			continue
		}
		if err := removeNamespace(e.Name()); err != nil {
			errs = append(errs, fmt.Errorf("remove network namespace %q: %w", e.Name(), err))
		}
	}
	etc, err := filepath.Glob(filepath.Join(etcDir, prefix+"-*"))
	for _, dir := range append(etc, dirOf(prefix)) {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return errors.Join(append(errs, err)...)
}

// stopLeftProcesses stops the processes that were given a path within dir on
// their command line. That is what identifies them: process numbers are used
// again.
func stopLeftProcesses(dir string) error {
	left := func() (pids []int) {
		entries, _ := os.ReadDir("/proc")
		for _, e := range entries {
			if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() && isOurs(pid, dir) {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	signal, until := unix.SIGTERM, time.Now().Add(stopTimeout)
	for {
		pids := left()
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, signal)
		}
		for time.Now().Before(until) && slices.ContainsFunc(pids, func(pid int) bool { return isOurs(pid, dir) }) {
			time.Sleep(20 * time.Millisecond)
		}
		if signal == unix.SIGKILL && time.Now().After(until) {
			return fmt.Errorf("processes %v of an earlier lab can't be stopped", pids)
		}
		if time.Now().After(until) {
			signal, until = unix.SIGKILL, time.Now().Add(time.Second)
		}
	}
}

// isOurs reports whether a process has an argument that is a path inside dir. A
// dead one that nobody has waited for has no command line.
func isOurs(pid int, dir string) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return false
	}
	args := strings.Split(string(b), "\x00")
	return len(args) > 1 && slices.ContainsFunc(args[1:], func(a string) bool { return strings.HasPrefix(a, dir+"/") })
}
