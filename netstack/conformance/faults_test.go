//go:build e2e

package conformance

import (
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/netstack"
)

// fault is a load or fault of docs/nat.md that needs real hosts.
type fault struct {
	id  string
	run func(w *world) (evidence string, err error)
}

// download fetches the page and checks it.
func (w *world) download() error {
	out, err := w.run(w.c1, "sh", "-c", "curl -s -m 30 http://"+hostH+"/blob | sha256sum")
	if err != nil {
		return err
	}
	if sum := fmt.Sprintf("%x", sha256.Sum256(w.page)); !strings.HasPrefix(out, sum) {
		return fmt.Errorf("the download came out changed: %s", tail(out))
	}
	return nil
}

// impaired downloads while rules act on what M forwards.
func (w *world) impaired(rules string) error {
	if err := w.m.sh("nft -f - <<'E'\ntable inet imp { chain f { type filter hook forward priority -400;\n" + rules + "\n}\n}\nE\n"); err != nil {
		return err
	}
	err := w.download()
	return errorsJoin(err, w.m.sh("nft delete table inet imp"))
}

var faults = []fault{
	{"LF-6", func(w *world) (string, error) {
		for _, p := range []int{1, 5} {
			if err := w.impaired(fmt.Sprintf("numgen random mod 100 < %d drop", p)); err != nil {
				return "", fmt.Errorf("%d %% loss: %w", p, err)
			}
		}
		return "20 MB over TCP intact at 1 and 5 % loss each way", nil
	}},
	{"LF-9", func(w *world) (string, error) {
		if err := w.m.sh("tc qdisc add dev mdn root tbf rate 1mbit burst 32kb latency 50ms"); err != nil {
			return "", err
		}
		defer func() { _ = w.m.sh("tc qdisc del dev mdn root") }()
		flood := make(chan error, 1)
		go func() { flood <- w.flood() }()
		_, err := expect(w, w.c2, ` 0% packet loss`, "ping", "-q", "-c", "10", "-i", "0.1", hostM)
		if err := errorsJoin(err, <-flood); err != nil {
			return "", err
		}
		out, err := w.run(w.m, "tc", "-s", "qdisc", "show", "dev", "mdn")
		if err == nil && strings.Contains(out, "dropped 0,") {
			err = fmt.Errorf("the link dropped nothing: %s", tail(out))
		}
		return "20 Mbit/s into 1 Mbit/s: another host's ping to M loses 0", err
	}},
	{"LF-10", func(w *world) (string, error) {
		check := func() error {
			_, err := expect(w, w.c1, ` 0% packet loss`, "ping", "-q", "-c", "3", "-i", "0.1", "-W", "2", hostH)
			return err
		}
		routes := "ip route add 10.77.100.0/24 dev zt; ip route add 10.77.200.0/24 dev zt"
		for _, c := range [][2]string{
			{"ip link set zt down", "ip link set zt up; " + routes},
			{"ip addr del 10.77.9.1/30 dev zt", "ip addr add 10.77.9.1/30 dev zt; " + routes},
			{"ip link set zt mtu 1300", "ip link set zt mtu 1500"},
		} {
			if err := w.k.sh(c[0]); err != nil {
				return "", err
			}
			_, _ = w.run(w.c1, "ping", "-q", "-c", "2", "-i", "0.1", "-W", "1", hostH)
			if err := w.k.sh(c[1]); err != nil {
				return "", err
			}
			if err := check(); err != nil {
				return "", fmt.Errorf("after %q: %w", c[0], err)
			}
		}
		return "TUN down, address removed, MTU changed and back: traffic comes back by itself", nil
	}},
	{"LF-18", func(w *world) (string, error) {
		// An upload, in which the inside speaks first afterwards.
		file := filepath.Join(w.t.TempDir(), "page")
		if err := os.WriteFile(file, w.page, 0o600); err != nil {
			return "", err
		}
		type res struct {
			out string
			err error
		}
		done := make(chan res, 1)
		go func() {
			out, err := w.run(w.c1, "curl", "-s", "-m", "30", "--limit-rate", "10M", "-T", file, "http://"+hostH+"/put")
			done <- res{out, err}
		}()
		if err := w.untilMoved(1 << 20); err != nil {
			return "", err
		}
		if err := w.restartEngine(); err != nil {
			return "", err
		}
		r := <-done
		if r.err != nil {
			return "", r.err
		}
		if sum := fmt.Sprintf("%x", sha256.Sum256(w.page)); r.out != sum {
			return "", fmt.Errorf("the upload did not survive: %s", tail(r.out))
		}
		return "an upload goes on over a restart with all state lost", nil
	}},
}

// flood sends 20 Mbit/s of UDP from V1 to H for a second and a half.
func (w *world) flood() error {
	return w.c1.do(func() error {
		c, err := net.Dial("udp4", hostH+":9")
		if err != nil {
			return err
		}
		defer c.Close()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for range 150 {
			for range 18 {
				_, _ = c.Write(w.page[:1400]) // refused ones come back as errors
			}
			<-tick.C
		}
		return nil
	})
}

// untilMoved waits until a flow has carried n bytes from its client.
func (w *world) untilMoved(n uint64) error {
	return testwait.Try(20*time.Second, func() error {
		for _, f := range w.engine.Flows(netstack.FlowFilter{Protocol: "tcp"}) {
			if f.BytesOut > n && f.State == "established" {
				return nil
			}
		}
		return fmt.Errorf("no flow moved %d bytes", n)
	})
}

// TestFaults runs the faults one after the other.
func TestFaults(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root for network namespaces")
	}
	w := newWorld(t)
	for i, f := range faults {
		t.Run(f.id, func(t *testing.T) {
			w.t = t
			q := requirement{n: 2000 + i, id: f.id, level: "fault", here: "yes"}
			evidence, err := f.run(w)
			if err != nil {
				loadReport.add(q, fails, err.Error())
				t.Error(err)
				return
			}
			loadReport.add(q, green, evidence)
			t.Log(evidence)
		})
	}
}
