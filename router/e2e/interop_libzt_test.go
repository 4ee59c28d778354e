//go:build e2e

package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
)

// libztMember is a member on libzt (testdata/libztmember.c). Its methods are safe
// for concurrent use.
type libztMember struct {
	lines chan string // what it says, but for numbers

	mu       sync.Mutex // guards the rest
	in       io.Writer
	asked    int
	answered map[int]bool
	ended    bool
}

// buildLibztMember compiles the member against the libzt of LIBZT_PREFIX.
func buildLibztMember(t *testing.T) string {
	t.Helper()
	prefix := os.Getenv("LIBZT_PREFIX")
	if prefix == "" {
		t.Skip("set LIBZT_PREFIX to where libzt is installed to test with it as a member")
	}
	binary := filepath.Join(t.TempDir(), "libztmember")
	lib := filepath.Join(prefix, "lib")
	out, err := exec.CommandContext(t.Context(), "gcc", "-O1", "-I"+filepath.Join(prefix, "include"), "-o", binary,
		filepath.Join("testdata", "libztmember.c"), "-L"+lib, "-lzt", "-Wl,-rpath,"+lib, "-lpthread").CombinedOutput()
	if err != nil {
		t.Fatalf("compile the member: %v\n%s", err, out)
	}
	return binary
}

// startLibztMember starts a member on a host, for the length of the test. When it
// returns, the member is online.
func startLibztMember(t *testing.T, m *lab.Mesh, host *lab.Node, binary, network string, ports []uint16) *libztMember {
	t.Helper()
	args := []string{host.Home, m.Planet(), network}
	for _, p := range ports {
		args = append(args, fmt.Sprint(p))
	}
	cmd := host.NS.Command(t.Context(), binary, args...)
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	cmd.Stderr = os.Stderr
	if err := errors.Join(err1, err2, host.NS.Do(cmd.Start)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	l := &libztMember{in: in, lines: make(chan string, 100), answered: map[int]bool{}}
	go l.read(out)
	if got, want := l.next(), "address "+host.Address; got != want {
		t.Fatalf("libzt says %q, want %q", got, want)
	}
	return l
}

// next returns the next line, or what the matter is.
func (l *libztMember) next() string {
	select {
	case line, ok := <-l.lines:
		if !ok {
			return "(it has ended)"
		}
		return line
	case <-time.After(patience):
		return "(nothing)"
	}
}

// read takes in what it says until it ends.
func (l *libztMember) read(out io.Reader) {
	defer close(l.lines)
	for scanner := bufio.NewScanner(out); scanner.Scan(); {
		if n, err := strconv.Atoi(scanner.Text()); err == nil {
			l.mu.Lock()
			l.answered[n] = true
			l.mu.Unlock()
			continue
		}
		select {
		case l.lines <- scanner.Text():
		default: // more than any test asks for
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
}

func (l *libztMember) say(format string, args ...any) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := fmt.Fprintf(l.in, format, args...)
	return err
}

// connect returns an error unless the member gets a line back from an echo server.
func (l *libztMember) connect(to netip.AddrPort) error {
	l.mu.Lock()
	l.asked++
	n := l.asked
	l.mu.Unlock()
	if err := l.say("connect %s %d %d\n", to.Addr(), to.Port(), n); err != nil {
		return err
	}
	return testwait.Try(2*time.Second, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.answered[n] {
			return nil
		}
		return fmt.Errorf("libzt gets no answer from %s (ended: %v)", to, l.ended)
	})
}
