//go:build e2e

package conformance

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// labPrefix names the namespaces of the lab this test runs: several may run at
// once.
var labPrefix = fmt.Sprintf("%s%d", labName, os.Getpid())

const labName = "zglabconf"

// TestUnderlay looks at the datagrams that carry the overlay, between two real
// nodes: rows 6040-a and 6040-b.
func TestUnderlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root for network namespaces")
	}
	bin := filepath.Join(t.TempDir(), "ztgate")
	build := exec.Command("go", "build", "-o", bin, "./cmd/ztgate")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build ztgate: %v: %s", err, tail(string(out)))
	}
	for _, name := range leftOvers() {
		if prefix, _, ok := strings.Cut(name, "-"); ok && strings.HasPrefix(prefix, labName) {
			if err := run(bin, "lab", "--down", "--prefix", prefix); err != nil {
				t.Logf("remove what a killed run left: %v", err)
			}
		}
	}
	t.Cleanup(func() {
		if err := run(bin, "lab", "--down", "--prefix", labPrefix); err != nil {
			t.Error(err)
		}
	})
	if err := run(bin, "lab", "--keep", "--prefix", labPrefix, "--duration", "1s"); err != nil {
		t.Fatal(err)
	}
	evidence, err := underlay()
	for _, id := range []string{"6040-a", "6040-b"} {
		q := requirementOf(id)
		if err != nil {
			ours.add(q, fails, err.Error())
			t.Error(err)
			continue
		}
		ours.add(q, green, evidence)
	}
	t.Log(evidence)
}

// underlay pings with a DSCP and ECT(0) and looks at both headers, first as the
// gateway sends them, then with congestion marked on the outer one.
func underlay() (string, error) {
	const inner = 0xba
	count := func(mark uint8) error {
		outer, err := listen("inet", "gw")
		if err != nil {
			return err
		}
		defer outer.stop()
		office, err := listen("office", "zt0")
		if err != nil {
			return err
		}
		defer office.stop()
		if _, err := runIn(labPrefix+"-vpc", "", "ping", "-q", "-Q", fmt.Sprint(inner), "-c", "5", "-i", "0.1", "-W", "2", "10.0.0.10"); err != nil {
			return err
		}
		carried, arrived := 0, 0
		for _, f := range outer.take() {
			if len(f) > ethernetLen+28 && binary.BigEndian.Uint16(f[12:]) == 0x0800 && f[ethernetLen+9] == protoUDP {
				if carried++; f[ethernetLen+1] != mark {
					return fmt.Errorf("outer TOS %#x, want %#x", f[ethernetLen+1], mark)
				}
			}
		}
		for _, f := range office.take() {
			if len(f) < ethernetLen+28 || binary.BigEndian.Uint16(f[12:]) != 0x0800 {
				continue
			}
			if p := parse(f[ethernetLen:]); p.proto == protoICMP && p.typ == 8 {
				if arrived++; p.tos != inner {
					return fmt.Errorf("inner TOS %#x, sent %#x", p.tos, inner)
				}
				if err := p.sumsRight(); err != nil {
					return err
				}
			}
		}
		if carried < 5 || arrived != 5 {
			return fmt.Errorf("%d datagrams seen, %d of 5 requests arrived", carried, arrived)
		}
		return nil
	}
	if err := count(0); err != nil {
		return "", err
	}
	gw := &namespace{labPrefix + "-gw"}
	if err := gw.sh("nft -f - <<'E'\ntable inet congestion { chain out { type filter hook output priority 0;\noifname \"eth-inet\" ip ecn set ce\n}\n}\nE\n"); err != nil {
		return "", err
	}
	if err := count(3); err != nil {
		return "", fmt.Errorf("with CE on the outer header: %w", err)
	}
	return "outer TOS 0 (DSCP 0, Not-ECT) with inner 0xba; CE set outside leaves the inner 0xba", nil
}

// listener is a tap that reads by itself.
type listener struct {
	*tap
	quit chan struct{}
}

func listen(role, name string) (*listener, error) {
	x, err := (&namespace{labPrefix + "-" + role}).tap(name)
	if err != nil {
		return nil, fmt.Errorf("%s in %s: %w", name, role, err)
	}
	l := &listener{x, make(chan struct{})}
	go x.read(l.quit)
	return l, nil
}

// take returns what was seen, once nothing more comes.
func (l *listener) take() [][]byte {
	for last := -1; ; time.Sleep(20 * time.Millisecond) {
		l.mu.Lock()
		n := len(l.frames)
		if n == last {
			defer l.mu.Unlock()
			return l.frames
		}
		last = n
		l.mu.Unlock()
	}
}

func (l *listener) stop() {
	close(l.quit)
	<-l.done
	_ = unix.Close(l.fd)
}
