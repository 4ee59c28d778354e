//go:build e2e

package faults

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/lab"
	"ztgate/zerotier/ztnode"
)

var (
	table = flag.Bool("table", false, "print the table")
	seed  = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of impairments and of the order of changes")
)

type result struct{ verdict, evidence string }

var (
	resultsMu sync.Mutex
	results   = map[string]result{}
)

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if *table && len(results) > 0 {
		fmt.Printf("\nwhole gateway, seed %d\n%-28s %-8s %s\n", *seed, "row", "verdict", "evidence")
		number := func(id string) int { n, _ := strconv.Atoi(strings.TrimPrefix(strings.Fields(id)[0], "LF-")); return n }
		for _, id := range slices.SortedFunc(maps.Keys(results), func(a, b string) int {
			return cmp.Or(number(a)-number(b), cmp.Compare(a, b))
		}) {
			fmt.Printf("%-28s %-8s %s\n", id, results[id].verdict, results[id].evidence)
		}
	}
	os.Exit(code)
}

// row runs one row on a world and records what it found.
func (w *world) row(id string, f func(w *world) string) {
	outer := w.t
	defer func() { w.t = outer }()
	outer.Run(id, func(t *testing.T) {
		w.t = t
		r := result{"fails", "see the log"}
		defer func() {
			if t.Skipped() {
				r = result{"not run", w.skipped}
			}
			resultsMu.Lock()
			defer resultsMu.Unlock()
			results[id] = r
		}()
		r.evidence = f(w)
		clean := w.clean()
		if !t.Failed() {
			r.verdict = "green"
			r.evidence += "; " + clean
		}
		t.Log(r.evidence)
	})
}

func TestFaults(t *testing.T) {
	for _, g := range []struct {
		name string
		run  func(w *world)
	}{
		{"wire", func(w *world) {
			w.row("LF-8", corruption)
		}},
		{"peer", func(w *world) {
			other := w.addOffice2()
			w.row("LF-11", func(w *world) string { return peerGone(w, other) })
			w.row("LF-12", peerBack)
		}},
		{"access", func(w *world) {
			w.row("LF-13", deauthorised)
			w.row("LF-14", changed)
			w.row("LF-15", rootGone)
			w.row("LF-28", loop)
		}},
		{"restart", func(w *world) {
			w.row("LF-18", func(w *world) string { return restart(w, true) })
			w.row("LF-19", func(w *world) string { return restart(w, false) })
			w.row("LF-10", tunGone)
		}},
		{"limits", func(w *world) {
			w.row("LF-20", memoryLimit)
			w.row("LF-21", starvation)
			w.row("LF-22", descriptorsAndDisk)
			w.prove()
		}},
	} {
		t.Run(g.name, func(t *testing.T) {
			if g.name != "limits" { // which takes all the machine has
				t.Parallel()
			}
			g.run(newWorld(t, g.name))
		})
	}
}

// many reports losses that aren't those of a busy machine, on which a queue of the
// kernel may overflow.
func many(lost, of int) bool { return lost > 1+of/100 }

// prove shows that the leak watcher sees a leak.
func (w *world) prove() {
	w.sh(w.Root, "ip addr add 172.31.99.1/32 dev lo; ping -c 1 -W 1 -I 172.31.99.1 203.0.113.20 >/dev/null || true")
	w.eventually(patience, func() error {
		if w.leaks.Load() == 0 {
			return errors.New("the leak watcher doesn't see a leak")
		}
		return nil
	})
}

// corruption flips bits of datagrams, loses, repeats and delays them.
func corruption(w *world) string {
	r := w.relay(*seed)
	p := w.probe(v1+":5000", office)
	w.eventually(patience, p.answered())
	base := w.metrics().By("ztgate_wire_rejected_packets_total", "reason")
	for _, c := range []struct {
		what string
		set  func()
	}{
		{"corruption", func() { r.corrupt = 0.01 }},
		{"5 % loss, 20 % repeated, 25 % late", func() { r.corrupt, r.loss, r.dup, r.late, r.delay = 0, 0.05, 0.2, 0.25, 5*time.Millisecond }},
	} {
		r.set(c.set)
		for range 2 {
			if err := w.transfer(4 << 20); err != nil {
				w.t.Fatalf("%s: %v", c.what, err)
			}
		}
	}
	r.set(func() { r.loss, r.dup, r.late = 0, 0, 0 })
	from := p.mark()
	w.eventually(patience, p.answered())
	now := w.metrics().By("ztgate_wire_rejected_packets_total", "reason")
	var refused []string
	for k, v := range now {
		if v > base[k] {
			refused = append(refused, fmt.Sprintf("%s %.0f", k, v-base[k]))
		}
	}
	slices.Sort(refused)
	if r.flipped.Load() == 0 || len(refused) == 0 {
		w.t.Errorf("%d bits flipped, refused by the gateway: %v", r.flipped.Load(), refused)
	}
	if n := p.altered + int(w.office.altered.Load()); n > 0 {
		w.t.Errorf("%d altered datagrams arrived", n)
	}
	for _, n := range []*lab.Namespace{w.VPC, w.Office} {
		for _, line := range strings.Split(w.sh(n, "nstat -asz TcpInCsumErrors UdpInCsumErrors IcmpInCsumErrors"), "\n") {
			if f := strings.Fields(line); len(f) > 1 && strings.HasSuffix(f[0], "CsumErrors") && f[1] != "0" {
				w.t.Errorf("%s: %s %s", n.Name, f[0], f[1])
			}
		}
	}
	lost, of := p.lost(from)
	return fmt.Sprintf("%d datagrams by the relay: %d with a bit flipped, %d lost, %d repeated, %d late; refused by the gateway: %s; 4 x 4 MB intact each way, altered datagrams delivered 0, wrong checksums at the hosts 0, probe lost %d of %d afterwards",
		r.passed.Load(), r.flipped.Load(), r.lost.Load(), r.repeated.Load(), r.delayed.Load(), strings.Join(refused, ", "), lost, of)
}

// transfer sends bytes through the echo server over TCP and compares them.
func (w *world) transfer(n int) error {
	s := w.dial(w.VPC, "", fmt.Sprintf("%s:%d", office, echoPort))
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(2 * patience))
	sum := sha256.New()
	sent := make(chan error, 1)
	go func() {
		buf := make([]byte, 64<<10)
		for left := n; left > 0; left -= len(buf) {
			copy(buf, message(uint32(left)))
			sum.Write(buf)
			if _, err := s.Write(buf); err != nil {
				sent <- err
				return
			}
		}
		sent <- s.Conn.(*net.TCPConn).CloseWrite()
	}()
	got := sha256.New()
	k, err := io.Copy(got, s)
	if err := errors.Join(err, <-sent); err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", k, n, err)
	}
	if string(got.Sum(nil)) != string(sum.Sum(nil)) {
		return errors.New("the bytes came back changed")
	}
	return nil
}

// peerGone ends the office's process.
func peerGone(w *world, other *echoServer) string {
	refused := w.refusals()
	p, q := w.probe(v1+":5000", office), w.probe(v2+":5000", office2)
	w.eventually(patience, p.answered())
	w.eventually(patience, q.answered())
	from, memory := q.mark(), w.rss()
	w.OfficeProcess.Kill()
	gone := time.Now()
	w.eventually(50*time.Second, func() error {
		if refused.unreachable.Load() == 0 {
			return errors.New("V hears nothing")
		}
		return nil
	})
	told := time.Unix(0, refused.first.Load()).Sub(gone).Round(100 * time.Millisecond)
	if code := refused.code.Load(); code != 1 {
		w.t.Errorf("unreachable code %d, want 1", code)
	}
	lost, of := q.lost(from)
	if many(lost, of) || other.altered.Load() > 0 {
		w.t.Errorf("the other peer's flow lost %d of %d", lost, of)
	}
	grown := w.rss() - memory
	if grown > 16<<20 {
		w.t.Errorf("memory grew by %d MB", grown>>20)
	}
	return fmt.Sprintf("3/1 %v after the peer was killed; the other peer's flow lost %d of %d; memory %+d KB", told, lost, of, grown>>10)
}

// peerBack starts the office again, twice, the second time at another address.
func peerBack(w *world) string {
	p := w.probe(v1+":5001", office)
	w.OfficeProcess = w.member(w.Office, "office")
	same := w.eventually(patience, p.answered())
	s := w.dial(w.VPC, v1+":4001", fmt.Sprintf("%s:%d", office, echoPort))
	w.must(s.exchange())
	w.OfficeProcess.Kill()
	w.sh(w.Office, "ip addr del 203.0.113.20/24 dev eth-inet; ip addr add 203.0.113.21/24 dev eth-inet")
	w.OfficeProcess = w.member(w.Office, "office")
	moved := w.eventually(patience, p.answered())
	if err := s.exchange(); err != nil {
		w.t.Errorf("the TCP connection didn't go on: %v", err)
	}
	if n := p.endpoints(); n != 1 {
		w.t.Errorf("the flow had %d external endpoints", n)
	}
	return fmt.Sprintf("flows go on %v after its start at the same address, %v at another one, with their mappings; an established TCP connection too", same, moved)
}

// deauthorised takes the gateway out of the network and puts it back.
func deauthorised(w *world) string {
	refused := w.refusals()
	p := w.probe(v1+":5000", office)
	s := w.dial(w.VPC, v1+":4000", fmt.Sprintf("%s:%d", office, echoPort))
	w.eventually(patience, p.answered())
	// The office also speaks by itself.
	quit := make(chan struct{})
	var pushing sync.WaitGroup
	defer pushing.Wait()
	defer close(quit)
	p.mu.Lock()
	to := slices.Collect(maps.Keys(p.ports))[0]
	p.mu.Unlock()
	target, err := net.ResolveUDPAddr("udp4", to)
	w.must(err)
	pushing.Go(func() {
		t := time.NewTicker(probeEvery)
		defer t.Stop()
		for {
			select {
			case <-quit:
				return
			case <-t.C:
				_, _ = w.office.udp.WriteTo(append([]byte("push "), message(0)...), target)
			}
		}
	})
	was := time.Now()
	w.authorise(w.GatewayMember, false)
	ctx := context.Background()
	w.eventually(patience, func() error {
		n, err := w.GatewayAPI.Networks(ctx)
		if err == nil && n.Networks[0].Status != ztnode.StatusDenied {
			err = fmt.Errorf("status %s", n.Networks[0].Status)
		}
		return err
	})
	time.Sleep(3 * time.Second) // in which something may still pass, or leak
	p.mu.Lock()
	stopped := p.last.Sub(was).Round(10 * time.Millisecond)
	p.mu.Unlock()
	if stopped > 2*time.Second {
		w.t.Errorf("packets from the office arrived for %v", stopped)
	}
	m := w.metrics()
	if got := m.Sum("ztgate_network_status", map[string]string{"status": ztnode.StatusDenied}); got != 1 {
		w.t.Errorf("ztgate_network_status{status=%q} is %v", ztnode.StatusDenied, got)
	}
	if w.logged("ACCESS_DENIED") == 0 {
		w.t.Error("the log doesn't say so")
	}
	back := time.Now()
	w.authorise(w.GatewayMember, true)
	w.eventually(patience, p.answered())
	resumed := time.Since(back).Round(10 * time.Millisecond)
	if err := s.exchange(); err != nil {
		w.t.Errorf("the TCP connection didn't go on: %v", err)
	}
	return fmt.Sprintf("both ways stop %v after it, resume %v after it is taken back with mappings and a TCP connection kept; log and metric say ACCESS_DENIED; meanwhile V heard %v, nothing by the default route", max(stopped, 0), resumed, refused)
}

// changed gives the gateway another address and the network other routes.
func changed(w *world) string {
	ctx := context.Background()
	p := w.probe(v1+":5002", office)
	w.eventually(patience, p.answered())
	var mu sync.Mutex
	var firstNew, lastOld time.Time
	w.sniff(w.Office, "zt0", match(unix.BPF_W, 12, 0xffffff00, 0x0a000000), func(b []byte, at *unix.SockaddrLinklayer) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case outgoing(at):
		case b[15] == 77 && firstNew.IsZero():
			firstNew = time.Now()
		case b[15] == 1:
			lastOld = time.Now()
		}
	})
	w.authorise(w.GatewayMember, true, "10.0.0.77")
	w.eventually(patience, func() error {
		mu.Lock()
		defer mu.Unlock()
		if firstNew.IsZero() {
			return errors.New("nothing comes from the new address")
		}
		return nil
	})
	w.sh(w.VPC, "ping -c 3 -i 0.2 -W 2 "+office)
	mu.Lock()
	overlap := lastOld.Sub(firstNew)
	mu.Unlock()
	if overlap > time.Second {
		w.t.Errorf("the old address was in use for %v more", overlap)
	}
	w.eventually(patience, p.answered())
	// Routes: one to use, and two that would lead VPC traffic astray.
	at := p.mark()
	set := func(routes ...string) {
		var list []any
		for _, r := range routes {
			target, via, _ := strings.Cut(r, " ")
			e := map[string]any{"target": target, "via": nil}
			if via != "" {
				e["via"] = via
			}
			list = append(list, e)
		}
		_, err := w.RootAPI.SetNetwork(ctx, w.Network.String(), map[string]any{"routes": list})
		w.must(err)
	}
	set("10.0.0.0/24", "10.60.0.0/24 10.0.0.10", "172.31.0.0/24 10.0.0.10", "172.31.0.0/16 10.0.0.10")
	w.sh(w.VPC, "ip route add 10.60.0.0/24 via 172.31.0.1")
	w.eventually(patience, func() error {
		out := w.sh(w.Gateway, "ip route show")
		if !strings.Contains(out, "10.60.0.0/24 dev ztg0") {
			return fmt.Errorf("the new route isn't there:\n%s", out)
		}
		return nil
	})
	n, err := w.GatewayAPI.Networks(ctx)
	w.must(err)
	problems := strings.Join(n.Networks[0].Problems, "; ")
	if !strings.Contains(problems, "172.31.0.0/16 is not used: it is the VPC's own") || w.logged("172.31.0.0/16 is not used") == 0 {
		w.t.Errorf("the overlap isn't reported: %q", problems)
	}
	if got := w.metrics().Sum("ztgate_route_conflicts", nil); got == 0 {
		w.t.Error("ztgate_route_conflicts is 0")
	}
	for _, host := range []string{v1, "172.31.0.200"} {
		if out := w.sh(w.Gateway, "ip route get "+host); !strings.Contains(out, "dev eth-vpc") {
			w.t.Errorf("the way to %s: %s", host, out)
		}
	}
	lost, of := p.lost(at)
	if many(lost, of) {
		w.t.Errorf("the probe lost %d of %d while routes changed", lost, of)
	}
	set("10.0.0.0/24")
	w.eventually(patience, func() error {
		if out := w.sh(w.Gateway, "ip route show"); strings.Contains(out, "10.60.0.0/24") {
			return fmt.Errorf("the route is still there:\n%s", out)
		}
		return nil
	})
	w.authorise(w.GatewayMember, true, gwOverlay)
	w.eventually(patience, p.answered())
	return fmt.Sprintf("packets with the old address %v after the first with the new one; a pushed route is used and taken away; 172.31.0.0/16 and /24 pushed: log, metric and status say so, VPC traffic keeps its way, probe lost %d of %d", max(overlap, 0).Round(time.Millisecond), lost, of)
}

// rootGone keeps the root and controller off the underlay.
func rootGone(w *world) string {
	p := w.probe(v1+":5003", office)
	w.eventually(patience, p.answered())
	from := p.mark()
	w.sh(w.Root, "nft 'add table inet off; add chain inet off i { type filter hook input priority 0; policy drop; }; add chain inet off o { type filter hook output priority 0; policy drop; }'")
	const pause = 12 * time.Second
	time.Sleep(pause / 2)
	if err := w.transfer(1 << 20); err != nil {
		w.t.Errorf("a new connection without the root: %v", err)
	}
	time.Sleep(pause / 2)
	lost, of := p.lost(from)
	w.sh(w.Root, "nft delete table inet off")
	if many(lost, of) {
		w.t.Errorf("the probe lost %d of %d", lost, of)
	}
	w.eventually(patience, func() error {
		return w.VPC.Do(func() error { return nil })
	})
	return fmt.Sprintf("%v without root and controller: probe lost %d of %d, new connections work", pause, lost, of)
}

// loop makes the office send packets for a target back to the gateway.
func loop(w *world) string {
	ctx := context.Background()
	p := w.probe(v1+":5004", office)
	w.eventually(patience, p.answered())
	_, err := w.RootAPI.SetNetwork(ctx, w.Network.String(), map[string]any{"routes": []any{
		map[string]any{"target": "10.0.0.0/24", "via": nil}, map[string]any{"target": "10.50.0.0/24", "via": office}}})
	w.must(err)
	w.eventually(patience, func() error {
		if out := w.sh(w.Gateway, "ip route show"); !strings.Contains(out, "10.50.0.0/24 dev ztg0") {
			return fmt.Errorf("the route isn't there:\n%s", out)
		}
		return nil
	})
	w.sh(w.Office, "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.zt0.send_redirects=0; ip route replace 10.50.0.0/24 via 10.0.0.1 dev zt0")
	w.sh(w.VPC, "ip route add 10.50.0.0/24 via 172.31.0.1")
	var mu sync.Mutex
	seen := map[bool]int{}
	w.sniff(w.Office, "zt0", match(unix.BPF_W, 16, 0xffffff00, 0x0a320000), func(b []byte, at *unix.SockaddrLinklayer) {
		mu.Lock()
		seen[outgoing(at)]++
		mu.Unlock()
	})
	const count = 20
	at := p.mark()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, _ = w.VPC.Run(ctx, "ping", "-c", strconv.Itoa(count), "-i", "0.05", "-W", "1", "10.50.0.9") // no answer
	mu.Lock()
	in, out := seen[false], seen[true]
	mu.Unlock()
	if in < count || in > count || out > count {
		w.t.Errorf("%d packets: %d reached the office, which sent back %d", count, in, out)
	}
	lost, of := p.lost(at)
	if many(lost, of) {
		w.t.Errorf("the probe lost %d of %d", lost, of)
	}
	return fmt.Sprintf("%d packets to a target that the office routes back: %d to the office, %d back, none forwarded a second time; probe lost %d of %d", count, in, out, lost, of)
}

// restart ends the gateway under flows of every kind and starts it again.
func restart(w *world, kill bool) string {
	name := "SIGTERM"
	if kill {
		name = "SIGKILL"
	}
	base := 4000
	if !kill {
		base = 4100
	}
	at := func(host string, port int) string { return fmt.Sprintf("%s:%d", host, port) }
	to := at(office, echoPort)
	kept, second := w.dial(w.VPC, at(v1, base), to), w.dial(w.VPC, at(v2, base), to)
	late := w.dial(w.VPC, at(v1, base+1), to)
	forwarded, reverse := w.dial(w.Office, "", at(gwOverlay, 8080)), w.dial(w.Office, "", at(gwOverlay, 8080))
	masked := w.dial(w.Office, "", at(gwOverlay, 8081))
	datagrams := w.probe(at(v1, base+2), office)
	waiting := w.probe(at(v1, base+3), office)
	for _, s := range []*stream{kept, second, late, forwarded, reverse, masked} {
		w.must(s.exchange())
	}
	w.eventually(patience, datagrams.answered())
	w.eventually(patience, waiting.answered())
	if kept.seen != at(gwOverlay, base) || second.seen == kept.seen {
		w.t.Fatalf("external endpoints %s and %s: want the first port kept and the second replaced", kept.seen, second.seen)
	}
	var mu sync.Mutex
	ids := map[uint16]int{}
	var resets []string
	w.sniff(w.Office, "zt0", isICMP, func(b []byte, _ *unix.SockaddrLinklayer) {
		if len(b) > 26 && b[20] == 8 {
			mu.Lock()
			ids[uint16(b[24])<<8|uint16(b[25])]++
			mu.Unlock()
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	pinged := make(chan string, 1)
	go func() {
		out, _ := w.VPC.Run(ctx, "ping", "-q", "-i", "0.2", "-c", "40", "-W", "1", office)
		pinged <- string(out)
	}()
	if kill {
		w.eventually(patience, func() error { // what a killed process wrote
			b, err := os.ReadFile(filepath.Join(w.Dir, "gw", "nat-mappings.json"))
			for _, s := range []string{at(v2, base), second.seen} {
				if err == nil && !strings.Contains(string(b), s) {
					err = fmt.Errorf("%s isn't in the saved mappings", s)
				}
			}
			return err
		})
	}
	refused := w.refusals()
	began := time.Now()
	// After an orderly end the host is as it was before: no guards.
	w.orderly.Store(!kill)
	if kill {
		w.GatewayProcess.Kill()
	} else {
		w.GatewayProcess.Stop()
	}
	exit := time.Since(began).Round(10 * time.Millisecond)
	if exit > 5*time.Second {
		w.t.Errorf("%s took %v", name, exit)
	}
	down := time.Now()
	_, _ = kept.Write([]byte("while it is down\n"))
	_, _ = w.VPC.Run(ctx, "curl", "-s", "-m", "1", "http://"+office+"/") // a new flow
	time.Sleep(500 * time.Millisecond)
	silent := refused.String()
	if kill && !refused.none() {
		w.t.Errorf("while the gateway was down V heard %s", silent)
	}
	ready := w.startGateway()
	w.orderly.Store(false)
	outage := time.Since(down).Round(10 * time.Millisecond)
	if ready > 10*time.Second {
		w.t.Errorf("ready after %v", ready)
	}
	w.sniff(w.Office, "zt0", isTCP, func(b []byte, at *unix.SockaddrLinklayer) {
		if len(b) > 33 && !outgoing(at) && b[33]&4 != 0 {
			mu.Lock()
			resets = append(resets, fmt.Sprintf("%s ports %d > %d", describe(b), uint(b[20])<<8|uint(b[21]), uint(b[22])<<8|uint(b[23])))
			mu.Unlock()
		}
	})
	check := func(what string, err error) {
		w.t.Helper()
		if err != nil {
			w.t.Errorf("%s: %v", what, err)
		}
	}
	// Whose port was replaced speaks first: it must not get the other one's.
	check("TCP, port replaced, inside first", second.exchange())
	if line, err := kept.line(); err != nil || line != "while it is down" {
		w.t.Errorf("TCP, port kept, inside first: %q, %v", line, err)
	}
	check("TCP, port kept", kept.exchange())
	_, err := w.office.conn(late.seen).Write([]byte("from outside\n"))
	check("TCP, outside first: write", err)
	_, err = late.Write([]byte("from inside\n"))
	check("TCP, outside first: write", err)
	for _, want := range []string{"from outside", "from inside"} {
		line, err := late.line()
		if err == nil && line != want {
			err = fmt.Errorf("got %q, want %q", line, want)
		}
		check("TCP, outside first", err)
	}
	check("forwarded TCP, outside first", forwarded.exchange())
	_, err = w.client.conn(reverse.seen).Write([]byte("from inside\n"))
	check("forwarded TCP, inside first: write", err)
	line, err := reverse.line()
	if err == nil && line != "from inside" {
		err = fmt.Errorf("got %q", line)
	}
	check("forwarded TCP, inside first", err)
	_, err = w.client.conn(masked.seen).Write([]byte("from inside\n"))
	check("masqueraded forward, inside first: write", err)
	line, err = masked.line()
	if err == nil && line != "from inside" {
		err = fmt.Errorf("got %q", line)
	}
	check("masqueraded forward, inside first", err)
	w.eventually(patience, datagrams.answered())
	w.eventually(patience, waiting.answered())
	for _, p := range []*probe{datagrams, waiting} {
		if n := p.endpoints(); n != 1 {
			w.t.Errorf("a UDP flow had %d external endpoints", n)
		}
	}
	out := <-pinged
	received := strings.SplitN(out, " received", 2)[0]
	received = received[strings.LastIndex(received, " ")+1:]
	mu.Lock()
	nids, rst := len(ids), resets
	mu.Unlock()
	if nids != 1 {
		w.t.Errorf("the ping was seen with %d identifiers", nids)
	}
	if len(rst) > 0 {
		w.t.Errorf("RSTs to the office: %v", rst)
	}
	astray := ""
	if n := w.astray.Load(); !kill {
		astray = fmt.Sprintf("; after an orderly end the host has no routes of ours, and %d packets of clients followed its default route", n)
	}
	note := fmt.Sprintf("%s, gone in %v, ready %v after its start, %v without service; survived with their ports: TCP with kept (%s) and replaced port (%s, inside first), TCP outside first, forwarded TCP outside and inside first, 2 UDP flows, ping (%s of 40, one identifier); no RST to the office; while down V heard %s%s",
		name, exit, ready, outage, kept.seen, second.seen, received, silent, astray)
	for _, s := range []*stream{kept, second, late, forwarded, reverse, masked} {
		_ = s.Close()
	}
	return note
}

// tunGone sets the TUN down, and then takes it away.
func tunGone(w *world) string {
	p := w.probe(v1+":5005", office)
	w.eventually(patience, p.answered())
	w.sh(w.Gateway, "ip link set ztg0 down")
	time.Sleep(time.Second)
	w.sh(w.Gateway, "ip link set ztg0 up")
	back := w.eventually(patience, p.answered())
	w.sh(w.Gateway, "ip link set ztg0 mtu 1300")
	w.eventually(patience, p.answered())
	w.sh(w.Gateway, "ip link set ztg0 mtu 2800")
	w.eventually(patience, p.answered())
	w.sh(w.Gateway, "ip link del ztg0")
	gone := time.Now()
	select {
	case <-w.GatewayProcess.Done():
	case <-time.After(patience):
		w.t.Fatal("without its TUN the gateway goes on")
	}
	exit := time.Since(gone).Round(10 * time.Millisecond)
	tail := w.GatewayProcess.Tail(3)
	if !strings.Contains(tail, `interface "ztg0" is gone`) {
		w.t.Errorf("the log doesn't say why:\n%s", tail)
	}
	// A process that ends by itself ends the scenario's page, so that the gateway
	// isn't ready; traffic is what counts.
	w.must(w.StartGateway(context.Background()))
	again := w.eventually(patience, p.answered())
	return fmt.Sprintf("TUN down and up: traffic %v later; MTU changed: goes on; TUN deleted: exits after %v and says why, traffic %v after the next start", back, exit, again)
}

// cgroup puts the gateway into a group of a v1 hierarchy with one limit, until
// the row ends.
func (w *world) cgroup(hierarchy, file, limit string) (dir string, release func()) {
	w.t.Helper()
	root := filepath.Join("/sys/fs/cgroup", hierarchy)
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		w.skip("no v1 hierarchy %s here", root)
	}
	dir = filepath.Join(root, w.Prefix)
	if err := os.Mkdir(dir, 0o755); err != nil {
		w.skip("no group can be made in %s: %v", root, err)
	}
	pid := []byte(strconv.Itoa(w.GatewayProcess.PID))
	release = sync.OnceFunc(func() {
		_ = os.WriteFile(filepath.Join(root, "cgroup.procs"), pid, 0)
		w.eventually(patience, func() error { return os.Remove(dir) })
	})
	w.t.Cleanup(release)
	if err := os.WriteFile(filepath.Join(dir, file), []byte(limit), 0); err != nil {
		w.skip("%s can't be set: %v", file, err)
	}
	_ = os.WriteFile(filepath.Join(dir, "memory.move_charge_at_immigrate"), []byte("3"), 0) // what it has already counts
	w.must(os.WriteFile(filepath.Join(dir, "cgroup.procs"), pid, 0))
	return dir, release
}

// skip ends a row that can't be run here.
func (w *world) skip(format string, a ...any) {
	w.skipped = fmt.Sprintf(format, a...)
	w.t.Skip(w.skipped)
}

func number(path string) int {
	b, err := os.ReadFile(path)
	if err != nil {
		return -1
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return n
}

// memoryLimit floods a gateway that has little memory.
func memoryLimit(w *world) string {
	const limit = 256 << 20
	p := w.probe(v1+":5006", office)
	s := w.dial(w.VPC, v1+":4010", fmt.Sprintf("%s:%d", office, echoPort))
	w.eventually(patience, p.answered())
	dir, release := w.cgroup("memory", "memory.limit_in_bytes", strconv.Itoa(limit))
	defer release()
	pid, from := w.GatewayProcess.PID, p.mark()
	start := time.Now()
	queue := func() int {
		var links []struct {
			Stats struct {
				TX struct{ Dropped int } `json:"tx"`
			} `json:"stats64"`
		}
		w.must(json.Unmarshal([]byte(w.sh(w.Gateway, "ip -j -s link show dev ztg0")), &links))
		return links[0].Stats.TX.Dropped
	}
	sent := 0
	full := func() bool {
		m := w.metrics()
		return m.Sum("ztgate_flows", nil) >= 0.99*m.Sum("ztgate_flows_limit", nil)
	}
	for !full() && time.Since(start) < 2*patience {
		sent += w.flood(30_000)
	}
	sent += w.flood(60_000)
	fragments := w.fragmentFlood(20_000)
	took := time.Since(start)
	m := w.metrics()
	flows, most := m.Sum("ztgate_flows", nil), m.Sum("ztgate_flows_limit", nil)
	refused := m.Sum("ztgate_flows_refused_total", nil)
	evicted := m.Sum("ztgate_flows_removed_total", map[string]string{"reason": "evicted"})
	var drops []string
	for k, v := range m.By("ztgate_dropped_packets_total", "reason") {
		if v >= 1000 {
			drops = append(drops, fmt.Sprintf("%s %.0f", k, v))
		}
	}
	slices.Sort(drops)
	if w.GatewayProcess.PID != pid || unix.Kill(pid, 0) != nil {
		w.t.Fatal("the gateway was killed")
	}
	if err := s.exchange(); err != nil {
		w.t.Errorf("the established connection: %v", err)
	}
	w.eventually(patience, p.answered())
	lost, of := p.lost(from)
	peak, fails := number(filepath.Join(dir, "memory.max_usage_in_bytes")), number(filepath.Join(dir, "memory.failcnt"))
	if flows > most || flows < most/2 {
		w.t.Errorf("%v flows of %v", flows, most)
	}
	return fmt.Sprintf("limit %d MB: %d new flows and %d fragments in %.1f s; %.0f flows of %.0f held, %.0f refused, %.0f evicted, drops: [%s], %d packets lost in the kernel's queue in front of the TUN; memory of the group at most %d MB, limit hit %d times, RSS %d MB; not killed, the TCP connection goes on, probe lost %d of %d",
		limit>>20, sent, fragments, took.Seconds(), flows, most, refused, evicted, strings.Join(drops, ", "), queue(), peak>>20, fails, w.rss()>>20, lost, of)
}

// starvation leaves the gateway a tenth of a processor.
func starvation(w *world) string {
	p := w.probe(v1+":5007", office)
	w.eventually(patience, p.answered())
	w.eventually(patience, func() error { // the flood of the row before is over
		if lost, of := p.lost(max(p.mark()-40, 0)); lost > 0 {
			return fmt.Errorf("lost %d of %d before it begins", lost, of)
		}
		return nil
	})
	dir, release := w.cgroup("cpu", "cpu.cfs_quota_us", "10000")
	memory, pid, from := w.rss(), w.GatewayProcess.PID, p.mark()
	done, stop := make(chan error, 1), make(chan struct{})
	moved := 0
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := w.transfer(2 << 20); err != nil {
				done <- err
				return
			}
			moved += 2
		}
	}()
	answers, longest := 0, time.Duration(0)
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		start := time.Now()
		c := http.Client{Transport: w.Gateway.HTTPClient().Transport, Timeout: 5 * time.Second}
		r, err := c.Get("http://127.0.0.1:9002/healthz")
		if err != nil {
			w.t.Errorf("health: %v", err)
			continue
		}
		_ = r.Body.Close()
		answers++
		longest = max(longest, time.Since(start))
	}
	close(stop)
	if err := <-done; err != nil {
		w.t.Errorf("transfer: %v", err)
	}
	lost, of := p.lost(from)
	grown := w.rss() - memory
	throttled := "throttled "
	if b, err := os.ReadFile(filepath.Join(dir, "cpu.stat")); err == nil {
		f := strings.Fields(string(b))
		if i := slices.Index(f, "nr_throttled"); i >= 0 && i+1 < len(f) {
			throttled += f[i+1] + " times"
		}
	}
	release()
	if w.GatewayProcess.PID != pid || unix.Kill(pid, 0) != nil {
		w.t.Fatal("the gateway ended")
	}
	if lost > of/5 {
		w.t.Errorf("the probe lost %d of %d", lost, of)
	}
	if grown > 64<<20 {
		w.t.Errorf("memory grew by %d MB", grown>>20)
	}
	at := p.mark()
	w.eventually(patience, p.answered())
	time.Sleep(time.Second)
	after, ofAfter := p.lost(at)
	if many(after, ofAfter) {
		w.t.Errorf("afterwards the probe lost %d of %d", after, ofAfter)
	}
	return fmt.Sprintf("10 %% of a processor for 8 s (%s), %d MB moved each way meanwhile: probe lost %d of %d, %d health checks answered, the longest after %v; memory %+d KB; afterwards lost %d of %d", throttled, moved, lost, of, answers, longest.Round(time.Millisecond), grown>>10, after, ofAfter)
}

// descriptorsAndDisk takes all descriptors, then fills the disk of the home.
func descriptorsAndDisk(w *world) string {
	p := w.probe(v1+":5008", office)
	w.eventually(patience, p.answered())
	from, lines, fds := p.mark(), w.logged(""), w.descriptors()
	var old unix.Rlimit
	w.must(unix.Prlimit(w.GatewayProcess.PID, unix.RLIMIT_NOFILE, nil, &old))
	w.must(unix.Prlimit(w.GatewayProcess.PID, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: old.Max}, nil))
	var held []net.Conn
	for range 100 {
		if c, err := net.DialTimeout("unix", filepath.Join(w.Dir, "gw", "ztgate.sock"), time.Second); err == nil {
			held = append(held, c)
		}
	}
	w.eventually(patience, func() error {
		if n := w.descriptors(); n < 60 {
			return fmt.Errorf("%d descriptors", n)
		}
		return nil
	})
	time.Sleep(3 * time.Second)
	if err := w.transfer(1 << 20); err != nil {
		w.t.Errorf("without descriptors: %v", err)
	}
	lost, of := p.lost(from)
	said := w.logged("") - lines
	for _, c := range held {
		_ = c.Close()
	}
	w.eventually(patience, func() error { _, err := w.GatewayAPI.Info(context.Background()); return err })
	w.must(unix.Prlimit(w.GatewayProcess.PID, unix.RLIMIT_NOFILE, &old, nil))
	if many(lost, of) || said > 20 {
		w.t.Errorf("without descriptors: the probe lost %d of %d, %d lines in the log", lost, of, said)
	}
	note := fmt.Sprintf("64 descriptors, all taken (%d before): probe lost %d of %d, %d lines in the log, the API is back afterwards", fds, lost, of, said)

	// A home on a disk of 1 MB that is full.
	w.orderly.Store(true)
	w.GatewayProcess.Stop()
	home := filepath.Join(w.Dir, "gw")
	before, err := os.ReadFile(filepath.Join(home, "identity.secret"))
	w.must(err)
	w.sh(w.Gateway, fmt.Sprintf("rm -f %[1]s/nat-mappings.json; cp -a %[1]s %[1]s.copy", home)) // the flood's were many
	w.must(unix.Mount("tmpfs", home, "tmpfs", 0, "size=1m,mode=0700"))
	w.t.Cleanup(func() { _ = unix.Unmount(home, unix.MNT_DETACH) })
	w.sh(w.Root, fmt.Sprintf("cp -a %[1]s.copy/. %[1]s/", home))
	w.startGateway()
	w.orderly.Store(false)
	w.eventually(patience, p.answered())
	fill, err := os.Create(filepath.Join(home, "fill"))
	w.must(err)
	for b := make([]byte, 4096); ; {
		if _, err := fill.Write(b); err != nil {
			break
		}
	}
	_ = fill.Close()
	from, lines = p.mark(), w.logged("no space left")
	for i := range 3 { // new mappings, so that there is something to write
		s := w.dial(w.VPC, fmt.Sprintf("%s:%d", v2, 4020+i), fmt.Sprintf("%s:%d", office, echoPort))
		w.must(s.exchange())
	}
	time.Sleep(12 * time.Second)
	if err := w.transfer(1 << 20); err != nil {
		w.t.Errorf("with a full disk: %v", err)
	}
	lost, of = p.lost(from)
	said = w.logged("no space left") - lines
	if many(lost, of) || said == 0 || said > 3 {
		w.t.Errorf("with a full disk: the probe lost %d of %d, %d lines about it in 12 s", lost, of, said)
	}
	w.orderly.Store(true)
	w.GatewayProcess.Stop()
	after, err := os.ReadFile(filepath.Join(home, "identity.secret"))
	if err != nil || string(after) != string(before) {
		w.t.Errorf("the identity is damaged: %v", err)
	}
	w.startGateway()
	w.orderly.Store(false)
	w.eventually(patience, p.answered())
	return note + fmt.Sprintf("; home on a full disk: probe lost %d of %d, %d lines about it in 12 s, restarts with the same identity", lost, of, said)
}
