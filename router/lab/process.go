package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a program that runs in a namespace for longer.
type Process struct {
	Name string
	PID  int
	Home string
	Log  string // file with what it prints

	cmd     *exec.Cmd
	done    chan struct{} // closed when it has ended
	err     error         // how, valid after done
	stopped atomic.Bool   // its end is wanted
}

// Home returns the home directory of a process by its name, and makes it.
func (t *Topology) Home(name string) (string, error) {
	dir := filepath.Join(t.Dir, name)
	return dir, os.MkdirAll(dir, 0o700)
}

// Start starts a program of ours in a namespace, with --home and its own
// directory after args. It ends with [Process.Stop] or [Topology.Close], not with
// this process.
func (t *Topology) Start(n *Namespace, name, binary string, args ...string) (*Process, error) {
	home, err := t.Home(name)
	if err != nil {
		return nil, err
	}
	return t.StartPlain(n, name, binary, append(args, "--home", home)...)
}

// StartPlain starts any program. One of its arguments has to be a path in the
// directory of the topology, by which a later lab recognises the process.
func (t *Topology) StartPlain(n *Namespace, name, binary string, args ...string) (*Process, error) {
	home, err := t.Home(name)
	if err != nil {
		return nil, err
	}
	p := &Process{Name: name, Home: home, Log: filepath.Join(t.LogDir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	if n.ownEtc() { // ip becomes the program, with the same process number
		args = append([]string{"netns", "exec", n.Name, binary}, args...)
		binary = "ip"
	}
	p.cmd = n.Command(context.Background(), binary, args...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = environ()
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // not stopped by the terminal
	if err := n.Do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s in %q: %w", name, n.Name, err)
	}
	p.PID = p.cmd.Process.Pid
	_ = os.WriteFile(filepath.Join(home, "pid"), []byte(strconv.Itoa(p.PID)+"\n"), 0o600) // for people
	t.mu.Lock()
	t.processes = append(t.processes, p)
	t.mu.Unlock()
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
		if !p.stopped.Load() {
			t.cancel(fmt.Errorf("%s ended: %w\n%s", name, cmpErr(p.err), p.Tail(10)))
		}
	}()
	return p, nil
}

var errExited = errors.New("exit status 0")

func cmpErr(err error) error {
	if err == nil {
		return errExited
	}
	return err
}

// environ is ours without settings for ztgate, which are not meant for the lab.
func environ() []string {
	var out []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "ZTGATE_") && !strings.HasPrefix(e, "ZEROTIER_") && !strings.HasPrefix(e, "ZT_") {
			out = append(out, e)
		}
	}
	return out
}

// Stop ends the process, kindly at first, and waits for its end.
func (p *Process) Stop() {
	p.stopped.Store(true)
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.done:
		return
	case <-time.After(stopTimeout):
	}
	p.Kill()
}

// Kill ends the process at once, as a crash does.
func (p *Process) Kill() {
	p.stopped.Store(true)
	_ = p.cmd.Process.Kill()
	<-p.done
}

// release lets go of the process, which runs on.
func (p *Process) release() { p.stopped.Store(true) }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Tail returns the last lines of the log.
func (p *Process) Tail(lines int) string {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return ""
	}
	all := bytes.Split(bytes.TrimRight(b, "\n"), []byte("\n"))
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	var out strings.Builder
	for _, l := range all {
		fmt.Fprintf(&out, "%s: %s\n", p.Name, l)
	}
	return out.String()
}

// CPU returns the processor time used so far.
func (p *Process) CPU() (time.Duration, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.PID), "stat"))
	if err != nil {
		return 0, fmt.Errorf("read processor time of %s: %w", p.Name, err)
	}
	// The name may hold anything; the fields after it are numbers. Ticks are
	// 1/100 s for user space on all systems.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("read processor time of %s: odd format", p.Name)
	}
	user, err1 := strconv.ParseInt(f[11], 10, 64)
	system, err2 := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}
