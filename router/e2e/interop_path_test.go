//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
)

// stream is a TCP connection on which one member sends to another all the time.
type stream struct {
	from, to *lab.Node
	received atomic.Int64
}

// openStream starts a stream, which ends with the test.
func openStream(t *testing.T, from, to *lab.Node, at netip.AddrPort) *stream {
	t.Helper()
	s := &stream{from: from, to: to}
	l, err := to.NS.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(&countTo{&s.received}, c)
	}()
	var c net.Conn
	testwait.NoError(t, 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		c, err = from.NS.Dial(ctx, "tcp", at.String())
		return err
	})
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		b := make([]byte, 8<<10)
		for pause := time.NewTicker(5 * time.Millisecond); ; <-pause.C { // about 13 Mbit/s
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}()
	return s
}

type countTo struct{ n *atomic.Int64 }

func (c *countTo) Write(b []byte) (int, error) {
	c.n.Add(int64(len(b)))
	return len(b), nil
}

// resumed waits until a stream moves again and returns how long that took. What
// was on the way when the test asked doesn't count.
func (s *stream) resumed(limit time.Duration) (time.Duration, error) {
	start := time.Now()
	const enough = 1 << 20 // more than is on the way
	first := s.received.Load()
	last, lastAt, longest := first, start, time.Duration(0)
	err := testwait.Try(limit, func() error {
		now := s.received.Load()
		if now != last {
			longest = max(longest, time.Since(lastAt))
			last, lastAt = now, time.Now()
		}
		if now-first < enough {
			return fmt.Errorf("%s to %s: only %d bytes in %v", s.from.Name, s.to.Name, now-first, time.Since(start).Round(time.Second))
		}
		return nil
	})
	return longest.Round(50 * time.Millisecond), err
}

// awaitAll waits until all streams move again.
func awaitAll(t *testing.T, after string, streams []*stream) {
	t.Helper()
	var wg sync.WaitGroup
	for _, s := range streams {
		wg.Go(func() {
			pause, err := s.resumed(2 * patience)
			if err != nil {
				t.Errorf("%s: %v", after, err)
				return
			}
			t.Logf("%s: %s to %s paused for %v", after, s.from.Name, s.to.Name, pause)
		})
	}
	wg.Wait()
}

// Either side gets another underlay address in the middle of transfers, which go
// on.
func TestInteropRoaming(t *testing.T) {
	eachRoot(t, "member roams: streams go on", func(t *testing.T, m *lab.Mesh) {
		network(t, m, nil)
		allReach(t, m)
		allDirect(t, m)
		var streams []*stream
		for i, from := range m.Nodes {
			for j, to := range m.Nodes {
				if i != j && (i == 0 || j == 0) { // real ones that both move lose each other for minutes
					streams = append(streams, openStream(t, from, to, netip.AddrPortFrom(overlayOf(j), uint16(7000+i))))
				}
			}
		}
		move := func(numbers ...int) {
			moves := func(n *lab.Node) bool {
				return slices.ContainsFunc(numbers, func(i int) bool { return m.Nodes[i] == n })
			}
			var names []string
			for _, i := range numbers {
				n := m.Nodes[i]
				names = append(names, n.Name)
				if err := n.Renumber(100 + i); err != nil {
					t.Fatal(err)
				}
			}
			awaitAll(t, strings.Join(names, " and ")+" moved", slices.DeleteFunc(slices.Clone(streams),
				func(s *stream) bool { return !moves(s.from) && !moves(s.to) }))
			pairs(t, m, func(from, to *lab.Node, _, j int) error {
				if from.Real() && to.Real() || !slices.Contains(numbers, j) {
					return nil
				}
				return testwait.Try(patience, func() error { return at(from, to, lab.MeshAddress(100+j).Addr()) })
			})
		}
		move(0)    // ours
		move(1, 2) // real ones look at their addresses every 30 s
	})
}

// at returns an error unless a node reaches another directly at an address.
func at(from, to *lab.Node, want netip.Addr) error {
	list, err := from.Endpoints(context.Background(), to)
	if err == nil && (len(list) == 0 || list[0].Addr() != want) {
		err = fmt.Errorf("%s reaches %s at %v, want %s", from.Name, to.Name, list, want)
	}
	return err
}

// keepPeers makes the root write its peer cache, without which real members would
// not be served for minutes after it was killed (chapter 02 §4.6). Ours writes it by
// and by, a real one when it is stopped.
func keepPeers(t *testing.T, m *lab.Mesh) {
	t.Helper()
	if m.Root.Real() {
		m.Root.Process.Stop()
		if err := m.Root.Start(m.Context()); err != nil {
			t.Fatal(err)
		}
	}
	list := m.Nodes
	if m.Controller != m.Root {
		list = append([]*lab.Node{m.Controller}, list...)
	}
	keeps(t, m.Root, list)
}

// bringBack starts the root again and waits until it sees all members: only then can
// it tell new ones about them.
func bringBack(t *testing.T, m *lab.Mesh) {
	t.Helper()
	start := time.Now()
	if err := m.Root.Start(m.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range m.Nodes {
		if err := testwait.Try(10*patience, func() error { // a killed zerotier-one may be deaf for minutes all the same
			list, err := m.Root.Endpoints(context.Background(), n)
			if err == nil && len(list) == 0 {
				err = fmt.Errorf("the root doesn't see %s", n.Name)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("the root sees all %v after its start", time.Since(start).Round(100*time.Millisecond))
}

// keeps waits until others are in the peer cache of a node.
func keeps(t *testing.T, n *lab.Node, others []*lab.Node) {
	t.Helper()
	for _, other := range others {
		if err := testwait.Try(2*patience, func() error {
			_, err := os.Stat(filepath.Join(n.Home, "peers.d", other.Address+".peer"))
			return err
		}); err != nil {
			t.Fatalf("%s doesn't keep %s: %v", n.Name, other.Name, err)
		}
	}
}

// Members go on without the root, which is killed. When it is back it serves new
// members, for whom it knows the others.
func TestInteropRootRestart(t *testing.T) {
	eachCrossed(t, "root killed: members go on; root is back: new members join", func(t *testing.T, m *lab.Mesh) {
		id := network(t, m, nil)
		allReach(t, m)
		keepPeers(t, m)
		allDirect(t, m)
		m.Root.Process.Kill()
		for range 5 {
			pairs(t, m, func(from, _ *lab.Node, _, j int) error {
				return testwait.Try(patience, func() error { return ping(from, overlayOf(j)) })
			})
		}
		bringBack(t, m)
		start := time.Now()
		for _, spec := range []lab.MeshMember{{Name: "late"}, {Name: "latereal", ZeroTierOne: reference(t)}} {
			n, err := m.Add(m.Context(), spec)
			if err != nil {
				t.Fatal(err)
			}
			admit(t, m, id, len(m.Nodes)-1, n)
			joinedLate(t, m, n, id)
		}
		pairs(t, m, func(from, to *lab.Node, i, j int) error {
			err := testwait.Try(4*patience, func() error { return ping(from, overlayOf(j)) })
			if max(i, j) > 2 {
				t.Logf("%s reaches %s %v after the root was back", from.Name, to.Name, time.Since(start).Round(100*time.Millisecond))
			}
			return err
		})
	})
}

// A member that is restarted while there is no root finds one of ours by its peer
// cache, and is found. So ours is also after it was killed; a real one writes its
// cache only when it is stopped. How long real ones take is logged.
func TestInteropPeerCache(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, path string
		kill       bool
	}{{"ours", "", false}, {"killed", "", true}, {"real", reference(t), false}, {"old", older(), false}} {
		if c.name == "old" && c.path == "" {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			how := "stopped"
			if c.kill {
				how = "killed"
			}
			recordTest(t, row{property: how + " and restarted without a root: reaches ours", root: nameOurs, controller: nameOurs, member: version(t, c.path), gateway: "-"})
			m := startMesh(t, lab.MeshOptions{Prefix: "cache" + c.name, Members: []lab.MeshMember{{Name: "mover", ZeroTierOne: c.path}, {Name: "ours"}, {Name: "real", ZeroTierOne: reference(t)}}})
			id := network(t, m, nil)
			allReach(t, m)
			allDirect(t, m)
			mover := m.Nodes[0]
			if c.kill {
				keeps(t, mover, m.Nodes[1:])
				m.Root.Process.Kill()
				mover.Process.Kill()
			} else {
				m.Root.Process.Kill()
				mover.Process.Stop()
			}
			if err := mover.Start(m.Context()); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			joined(t, mover, id)
			t.Logf("joined %v after the start", time.Since(start).Round(100*time.Millisecond))
			pairs(t, m, func(from, to *lab.Node, i, j int) error {
				err := testwait.Try(2*patience, func() error { return ping(from, overlayOf(j)) })
				t.Logf("%s reaches %s %v after the start: %v", from.Name, to.Name, time.Since(start).Round(100*time.Millisecond), err == nil)
				if from.Name == "real" || to.Name == "real" {
					return nil // those sometimes need more than two minutes, also among themselves
				}
				return err
			})
		})
	}
}

// With two ways to each other, members leave the one that died, whichever of them
// preferred it.
func TestInteropFailover(t *testing.T) {
	t.Parallel()
	real := reference(t)
	recordTest(t, row{property: "failover between two links", root: nameOurs, controller: nameOurs, member: "ours," + version(t, real), gateway: "-"})
	m := mesh(t, "", []lab.MeshMember{{Name: "ours", Spare: true}, {Name: "real", ZeroTierOne: real, Spare: true}})
	network(t, m, nil)
	allReach(t, m)
	ours, other := m.Nodes[0], m.Nodes[1]
	streams := []*stream{
		openStream(t, ours, other, netip.AddrPortFrom(overlayOf(1), 7000)),
		openStream(t, other, ours, netip.AddrPortFrom(overlayOf(0), 7000)),
	}
	for _, viewer := range m.Nodes {
		var via string
		for _, pair := range [][2]*lab.Node{{ours, other}, {other, ours}} {
			if err := testwait.Try(3*patience, func() error {
				link, err := bothWays(pair[0], pair[1])
				if pair[0] == viewer {
					via = link
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
		if err := other.Unplug(m.Context(), via); err != nil {
			t.Fatal(err)
		}
		awaitAll(t, fmt.Sprintf("%s, preferred by %s, died", via, viewer.Name), streams)
		if err := other.Replug(m.Context(), via); err != nil {
			t.Fatal(err)
		}
	}
}

// bothWays returns the link by which a node prefers to reach another, and an error
// unless it knows a way over each link.
func bothWays(from, to *lab.Node) (string, error) {
	list, err := from.Endpoints(context.Background(), to)
	if err != nil {
		return "", err
	}
	main := func(e netip.AddrPort) bool { return lab.MeshAddress(0).Contains(e.Addr()) }
	if !slices.ContainsFunc(list, main) || !slices.ContainsFunc(list, func(e netip.AddrPort) bool { return !main(e) }) {
		return "", fmt.Errorf("%s knows only %v of %s", from.Name, list, to.Name)
	}
	if main(list[0]) {
		return lab.MeshLink, nil
	}
	return lab.MeshSpare, nil
}
