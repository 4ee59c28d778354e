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
	"strings"
	"testing"
	"time"

	"ztgate/router/lab"
)

// libztMember is a member on libzt (testdata/libztmember.c).
type libztMember struct {
	in    io.Writer
	lines chan string // what it says
	asked int
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
func startLibztMember(t *testing.T, m *lab.Mesh, host *lab.Node, binary, network string, port uint16) *libztMember {
	t.Helper()
	cmd := host.NS.Command(t.Context(), binary, host.Home, m.Planet(), network, fmt.Sprint(port))
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
	l := &libztMember{in: in, lines: make(chan string, 1000)} // more than the test asks for
	go func() {
		defer close(l.lines)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			l.lines <- scanner.Text()
		}
	}()
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

// connect returns an error unless the member gets a line back from an echo server.
func (l *libztMember) connect(to netip.AddrPort) error {
	l.asked++
	if _, err := fmt.Fprintf(l.in, "connect %s %d %d\n", to.Addr(), to.Port(), l.asked); err != nil {
		return err
	}
	enough := time.After(2 * time.Second)
	for {
		select {
		case line, ok := <-l.lines:
			if !ok {
				return errors.New("libzt has ended")
			}
			if line == fmt.Sprint(l.asked) {
				return nil
			} // else a late answer to an earlier one
		case <-enough:
			return fmt.Errorf("libzt gets no answer from %s", to)
		}
	}
}

// echoed returns an error unless a line comes back to a member.
func echoed(from *lab.Node, at netip.AddrPort) error {
	if err := connect(from, at); err != nil {
		return err
	}
	ctx, cancel := stepContext()
	defer cancel()
	c, err := from.NS.Dial(ctx, "tcp", at.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 5))
	return err
}

// A member on libzt: it joins, has traffic with ours and real ones both ways, is put
// out, and comes back.
func TestInteropLibzt(t *testing.T) {
	binary := buildLibztMember(t)
	eachRoot(t, func(t *testing.T, root string) {
		m := mesh(t, root, members(t))
		id := network(t, m, nil)
		const number, port = 50, 7000
		host, err := m.Host("libzt", number)
		if err != nil {
			t.Fatal(err)
		}
		own := netip.AddrPortFrom(overlayOf(number), port)
		setMember(t, m, id, host, map[string]any{"authorized": true, "ipAssignments": []string{own.Addr().String()}})
		l := startLibztMember(t, m, host, binary, id.String(), port)
		if got, want := l.next(), "joined "+own.Addr().String(); !strings.HasPrefix(got, want) {
			t.Fatalf("libzt says %q, want %q", got, want)
		}
		for i, n := range m.Nodes {
			echoOn(t, n, netip.AddrPortFrom(overlayOf(i), port))
		}
		check := func(reach bool) {
			t.Helper()
			start := time.Now()
			for i, n := range m.Nodes {
				at := netip.AddrPortFrom(overlayOf(i), port)
				eventually(t, func() error {
					for what, err := range map[string]error{"ping": ping(n, own.Addr()), "connection": echoed(n, own), "connection from libzt": l.connect(at)} {
						if (err == nil) != reach {
							return fmt.Errorf("%s: %s: %v, want success: %v", n.Name, what, err, reach)
						}
					}
					return nil
				})
			}
			t.Logf("all members and libzt reach each other: %v, after %v", reach, time.Since(start).Round(100*time.Millisecond))
		}
		check(true)
		setMember(t, m, id, host, map[string]any{"authorized": false})
		check(false)
		setMember(t, m, id, host, map[string]any{"authorized": true})
		check(true)
	})
}
