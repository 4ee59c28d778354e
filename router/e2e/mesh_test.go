//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
	"ztgate/router/lab/labtest"
	"ztgate/zerotier/ztnode"
)

// subnet is the overlay's; members are its .10 and following.
var subnet = netip.MustParsePrefix("10.77.0.0/24")

func overlayOf(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 77, 0, byte(10 + i)}) }

// older returns the path of a second, older zerotier-one, or "".
func older() string { return os.Getenv("ZT_ONE_OLD") }

// newer returns the path of a zerotier-one of protocol 13, or "".
func newer() string { return os.Getenv("ZT_ONE_NEW") }

// independent returns the path of a node in Go that others wrote, with the command line and
// the API of a zerotier-one, or "".
func independent() string { return os.Getenv("ZT_GO") }

// eachRoot runs f for each implementation of a root that is the controller too, at once, with
// a mesh of members around it. How it goes is recorded as a property of them.
func eachRoot(t *testing.T, property string, f func(t *testing.T, m *lab.Mesh)) {
	t.Parallel()
	for _, k := range implementations(t) {
		t.Run("root_"+k.name, func(t *testing.T) {
			t.Parallel()
			recordTest(t, row{property: property, root: k.name, controller: k.name, member: memberNames(t), gateway: "-"})
			f(t, mesh(t, k.path, members(t)))
		})
	}
}

// eachCrossed is eachRoot, but the controller is a node of its own and of another
// implementation.
func eachCrossed(t *testing.T, property string, f func(t *testing.T, m *lab.Mesh)) {
	t.Parallel()
	impls := implementations(t)
	for i, root := range impls {
		controller := impls[(i+1)%len(impls)]
		t.Run("root_"+root.name+"_controller_"+controller.name, func(t *testing.T) {
			t.Parallel()
			recordTest(t, row{property: property, root: root.name, controller: controller.name, member: memberNames(t), gateway: "-"})
			f(t, startMesh(t, lab.MeshOptions{Prefix: nameOf(t), Root: root.path, Separate: true, Controller: controller.path, Members: members(t)}))
		})
	}
}

// members are ours, a real one, and a third one: an older real one if there is
// one, else ours again.
func members(t *testing.T) []lab.MeshMember {
	third := lab.MeshMember{Name: "old", ZeroTierOne: older()}
	if older() == "" {
		third.Name = "ours2"
	}
	return []lab.MeshMember{{Name: "ours"}, {Name: "real", ZeroTierOne: reference(t)}, third}
}

// memberNames are the implementations of members, as in a row of the table.
func memberNames(t *testing.T) string {
	var names []string
	for _, m := range members(t) {
		names = append(names, version(t, m.ZeroTierOne))
	}
	return strings.Join(names, ",")
}

// nameOf is a short name of a test for namespaces: many run at once.
func nameOf(t *testing.T) string {
	own := strings.ToLower(strings.TrimPrefix(t.Name(), "TestInterop"))
	return strings.NewReplacer("/root_", "", "_controller_", "", ".", "").Replace(own)
}

// mesh brings nodes up for the length of the test.
func mesh(t *testing.T, root string, list []lab.MeshMember) *lab.Mesh {
	t.Helper()
	return startMesh(t, lab.MeshOptions{Prefix: nameOf(t), Root: root, Members: list})
}

// startMesh is mesh with all its options.
func startMesh(t *testing.T, mo lab.MeshOptions) *lab.Mesh {
	t.Helper()
	o := options(t)
	mo.Binary, mo.Prefix = o.Binary, o.Prefix+mo.Prefix
	m, err := lab.StartMesh(context.Background(), mo)
	if m != nil {
		labtest.End(t, m.Topology)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// network makes a network, authorises all members with addresses of the subnet,
// joins them and waits until they have what they were given.
func network(t *testing.T, m *lab.Mesh, patch map[string]any) ztnode.NetworkID {
	t.Helper()
	ctx := m.Context()
	all := map[string]any{"name": "interop", "private": true, "routes": []any{map[string]any{"target": subnet.String(), "via": nil}}}
	for k, v := range patch {
		all[k] = v
	}
	id, err := m.CreateNetwork(ctx, all)
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range m.Nodes {
		admit(t, m, id, i, n)
	}
	for _, n := range m.Nodes {
		joined(t, n, id)
	}
	return id
}

// admit authorises a member and tells it to join.
func admit(t *testing.T, m *lab.Mesh, id ztnode.NetworkID, i int, n *lab.Node) {
	t.Helper()
	setMember(t, m, id, n, map[string]any{"authorized": true, "ipAssignments": []string{overlayOf(i).String()}})
	if err := n.Join(m.Context(), id); err != nil {
		t.Fatal(err)
	}
}

func setMember(t *testing.T, m *lab.Mesh, id ztnode.NetworkID, n *lab.Node, patch map[string]any) {
	t.Helper()
	if err := m.SetMember(m.Context(), id, n, patch); err != nil {
		t.Fatal(err)
	}
}

// joined waits until a node has the configuration and the kernel all addresses of
// it, and returns them.
func joined(t *testing.T, n *lab.Node, id ztnode.NetworkID) lab.NetworkState {
	t.Helper()
	return joinedWithin(t, patience, n, id)
}

// joinedLate does so after the root was away: a zerotier-one that was killed, and those
// who talk to it, may not hear each other for 2 minutes and 18 seconds (chapter 02 §4.6).
func joinedLate(t *testing.T, m *lab.Mesh, n *lab.Node, id ztnode.NetworkID) {
	t.Helper()
	start, d := time.Now(), patience
	if m.Root.Real() {
		d = 6 * patience
	}
	joinedWithin(t, d, n, id)
	t.Logf("%s joined %v after its start", n.Name, time.Since(start).Round(100*time.Millisecond))
}

func joinedWithin(t *testing.T, d time.Duration, n *lab.Node, id ztnode.NetworkID) lab.NetworkState {
	t.Helper()
	var s lab.NetworkState
	err := testwait.Try(d, func() (err error) {
		if s, err = n.Network(context.Background(), id); err != nil {
			return err
		}
		if s.Status != ztnode.StatusOK || s.Device == "" || len(s.Addresses) == 0 {
			return fmt.Errorf("%s: network %s is %s with %v on %q", n.Name, id, s.Status, s.Addresses, s.Device)
		}
		if n.VPC != nil && !n.Real() {
			return nil // the kernel has none of them
		}
		out, err := n.NS.Run(context.Background(), "ip", "-o", "addr", "show", "dev", s.Device)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		for _, p := range s.Addresses {
			if !strings.Contains(string(out), p.String()) {
				return fmt.Errorf("%s has no %s yet:\n%s", n.Name, p, out)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// ping sends one echo request and waits a second for the answer.
func ping(from *lab.Node, to netip.Addr) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if out, err := from.NS.Run(ctx, "ping", "-n", "-c", "1", "-W", "1", to.String()); err != nil {
		return fmt.Errorf("%s to %s: %w: %s", from.Name, to, err, lastLine(out))
	}
	return nil
}

func lastLine(b []byte) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}

// pairs calls f for all ordered pairs of members at once, and ends the test if
// any returns an error.
func pairs(t *testing.T, m *lab.Mesh, f func(from, to *lab.Node, i, j int) error) {
	t.Helper()
	errs := make(chan error)
	count := 0
	for i, from := range m.Nodes {
		for j, to := range m.Nodes {
			if i != j {
				count++
				go func() { errs <- f(from, to, i, j) }()
			}
		}
	}
	var all error
	for range count {
		all = errors.Join(all, <-errs)
	}
	if all != nil {
		t.Fatal(all)
	}
}

// patience is how long most things may take.
const patience = 30 * time.Second

// allReach waits until all members reach each other by their address in the subnet.
func allReach(t *testing.T, m *lab.Mesh) {
	t.Helper()
	pairs(t, m, func(from, _ *lab.Node, _, j int) error {
		return testwait.Try(patience, func() error { return ping(from, overlayOf(j)) })
	})
}

// allDirect waits until all members see each other directly.
func allDirect(t *testing.T, m *lab.Mesh) {
	t.Helper()
	pairs(t, m, func(from, to *lab.Node, _, _ int) error {
		return testwait.Try(patience, func() error {
			list, err := from.Endpoints(context.Background(), to)
			if err == nil && len(list) == 0 {
				err = fmt.Errorf("%s doesn't reach %s directly", from.Name, to.Name)
			}
			return err
		})
	})
}

// accept takes connections on a port of a node until the test ends, and discards
// what arrives.
func accept(t *testing.T, n *lab.Node, at netip.AddrPort) {
	t.Helper()
	serve(t, n.NS, at, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
}

// echoOn is accept, but what arrives goes back.
func echoOn(t *testing.T, n *lab.Namespace, at netip.AddrPort) {
	t.Helper()
	serve(t, n, at, func(c net.Conn) { _, _ = io.Copy(c, c) })
}

func serve(t *testing.T, n *lab.Namespace, at netip.AddrPort, f func(net.Conn)) {
	t.Helper()
	var l net.Listener
	testwait.NoError(t, 30*time.Second, func() (err error) { // a new IPv6 address takes a moment
		l, err = n.Listen("tcp", at.String())
		return err
	})
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				f(c)
				_ = c.Close()
			}()
		}
	}()
}

func stepContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 1500*time.Millisecond)
}

// connect tries a TCP connection for a while that covers one repeated SYN.
func connect(from *lab.Node, to netip.AddrPort) error {
	ctx, cancel := stepContext()
	defer cancel()
	c, err := from.NS.Dial(ctx, "tcp", to.String())
	if err == nil {
		err = c.Close()
	}
	return err
}

// inbox receives datagrams on a port of a node until the test ends.
type inbox struct {
	at   netip.AddrPort
	mu   sync.Mutex
	seen map[string]bool // by content
}

func openInbox(t *testing.T, n *lab.Node, at netip.AddrPort) *inbox {
	t.Helper()
	c, err := n.NS.ListenPacket("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	return newInbox(t, c, at)
}

func newInbox(t *testing.T, c net.PacketConn, at netip.AddrPort) *inbox {
	in := &inbox{at: at, seen: map[string]bool{}}
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		b := make([]byte, 100)
		for {
			k, _, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			in.mu.Lock()
			in.seen[string(b[:k])] = true
			in.mu.Unlock()
		}
	}()
	return in
}

func (in *inbox) has(text string) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.seen[text]
}

// deliver sends datagrams for a while and returns nil as soon as one of them
// arrives.
func deliver(from *lab.Node, in *inbox) error {
	out, err := from.NS.ListenPacket("udp", "")
	if err != nil {
		return err
	}
	defer out.Close()
	text := fmt.Sprintf("%s %d", from.Name, time.Now().UnixNano())
	for range 30 {
		if _, err = out.WriteTo([]byte(text), net.UDPAddrFromAddrPort(in.at)); err != nil {
			err = fmt.Errorf("send from %s: %w", from.Name, err) // the address may be gone
		}
		if testwait.Poll(50*time.Millisecond, func() bool { return in.has(text) }) {
			return nil
		}
	}
	return errors.Join(err, fmt.Errorf("datagrams from %s to %s don't arrive", from.Name, in.at))
}

// not turns success into an error and the reverse.
func not(err error, format string, args ...any) error {
	if err == nil {
		return fmt.Errorf(format, args...)
	}
	return nil
}
