//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
	"ztgate/zerotier/ztnode"
)

// Implementations of nodes, as the table calls them; real ones go by their version.
const (
	nameOurs  = "ours"
	nameLibzt = "libzt"
)

// implementation is one of a node: ours, on libzt, or the zerotier-one at a path.
type implementation struct {
	name, path string
	seals      ztnode.SealedHello
}

// sealing is the same implementation with all HELLOs sealed.
func (k implementation) sealing() implementation {
	return implementation{k.name + " sealing", k.path, ztnode.SealedHelloAlways}
}

// auto is the same implementation with HELLOs sealed to those that open them.
func (k implementation) auto() implementation {
	return implementation{k.name + " auto", k.path, ztnode.SealedHelloAuto}
}

// implementations returns ours and the real ones that there are.
func implementations(t *testing.T) []implementation {
	out := []implementation{{name: nameOurs}, {name: version(t, reference(t)), path: reference(t)}}
	if older() != "" {
		out = append(out, implementation{name: version(t, older()), path: older()})
	}
	return out
}

// version returns the version of a zerotier-one; ours for "".
func version(t *testing.T, path string) string {
	t.Helper()
	if path == "" {
		return nameOurs
	}
	out, err := exec.CommandContext(t.Context(), path, "-v").Output()
	if err != nil {
		t.Fatalf("ask %s for its version: %v", path, err)
	}
	return strings.TrimSpace(string(out))
}

// party is a member or a gateway in [every].
type party struct {
	implementation
	node  *lab.Node // or its host
	addr  netip.Addr
	libzt *libztMember // if it is a member on libzt's own stack
}

// every is a network of a member and a gateway of each implementation around one root and
// one controller.
type every struct {
	*lab.Mesh
	id               ztnode.NetworkID
	impls            []implementation
	root, controller string
	members          []party
	gateways         []party
}

// portsOfAll are served by all members and by the hosts behind all gateways.
var portsOfAll = []uint16{portTagged, portInbound, portOutbound, portCapability, portPlain}

const portPlain = 7777

// everyRules are those of [accessRules], but the capability is for TCP. It counts
// because the rules come to no decision.
func everyRules() []rule {
	out := append(tcpTo(portCapability), rule{"type": "ACTION_BREAK"})
	out = append(out, accessRules()...)
	return append(out, rule{"type": "MATCH_IP_PROTOCOL", "ipProtocol": 58}, rule{"type": "ACTION_ACCEPT"})
}

// Every mix of root, controller, member and gateway: each can be ours or a real one
// of either version; members and gateways also libzt. Each member reaches a host in
// each gateway's VPC and the reverse. With three of the mixes of root and
// controller, in which each implementation has either part once, all other properties too.
func TestInteropEvery(t *testing.T) {
	t.Parallel()
	impls := implementations(t)
	for r, root := range impls {
		for c, controller := range impls {
			t.Run(fmt.Sprintf("root_%s_controller_%s", root.name, controller.name), func(t *testing.T) {
				t.Parallel()
				e := startEvery(t, fmt.Sprintf("e%d%d", r, c), root, controller, impls)
				e.traffic(t)
				if c != (r+1)%len(impls) {
					return
				}
				e.access(t)
				e.deauthorise(t)
				e.derived(t, "6PLANE and RFC 4193", e.id)
				flows := e.openFlows(t)
				e.killRoot(t, flows)
				e.roam(t, flows)
				e.adHoc(t)
			})
		}
	}
}

func startEvery(t *testing.T, name string, root, controller implementation, impls []implementation) *every {
	o := lab.MeshOptions{Prefix: name, Root: root.path, Separate: true, Controller: controller.path, Seal: root.seals, Libzt: os.Getenv("ZTGATE_LIBZT")}
	e := &every{root: root.name, controller: controller.name, impls: impls}
	for i, k := range impls {
		o.Members = append(o.Members, lab.MeshMember{Name: "m" + strconv.Itoa(i), ZeroTierOne: k.path, Seal: k.seals})
		e.members = append(e.members, party{implementation: k})
	}
	if o.Libzt != "" {
		impls = append(slices.Clone(impls), implementation{name: nameLibzt})
	}
	for i, k := range impls {
		o.Members = append(o.Members, lab.MeshMember{Name: "g" + strconv.Itoa(i), ZeroTierOne: k.path, Seal: k.seals, Libzt: k.name == nameLibzt,
			Gateway: true, Forwarded: portsOfAll})
		e.gateways = append(e.gateways, party{implementation: k})
	}
	start := time.Now()
	e.Mesh = startMesh(t, o)
	for i, n := range e.Nodes {
		p := e.party(i)
		p.node, p.addr = n, overlayOf(i)
	}
	e.id = network(t, e.Mesh, map[string]any{
		"rules":        everyRules(),
		"tags":         []rule{{"id": tagDepartment, "default": 1}},
		"v6AssignMode": map[string]bool{"rfc4193": true, "6plane": true, "zt": false},
		"capabilities": []rule{{"id": 1, "default": false, "rules": append(tcpTo(portCapability), rule{"type": "ACTION_ACCEPT"})}},
	})
	if prefix := os.Getenv("LIBZT_PREFIX"); prefix != "" {
		const number = 50
		host, err := e.Host(nameLibzt, number)
		if err != nil {
			t.Fatal(err)
		}
		p := party{implementation: implementation{name: nameLibzt}, node: host, addr: overlayOf(number)}
		e.set(t, p, map[string]any{"authorized": true, "ipAssignments": []string{p.addr.String()}})
		p.libzt = startLibztMember(t, e.Mesh, host, buildLibztMember(t), e.id.String(), portsOfAll)
		if got, want := p.libzt.next(), "joined "+p.addr.String(); !strings.HasPrefix(got, want) {
			t.Fatalf("libzt says %q, want %q", got, want)
		}
		e.members = append(e.members, p)
	}
	for _, port := range portsOfAll {
		for _, p := range e.members {
			if p.libzt == nil {
				echoOn(t, p.node.NS, netip.AddrPortFrom(p.addr, port))
			}
		}
		for _, p := range e.gateways {
			echoOn(t, p.node.VPC, netip.AddrPortFrom(lab.VPCHost, port))
		}
	}
	for _, m := range e.members {
		for _, g := range e.gateways {
			record(row{"join", e.root, e.controller, m.name, g.name, passed, time.Since(start)})
		}
	}
	return e
}

// party returns member or gateway by its number among the nodes.
func (e *every) party(i int) *party {
	if i < len(e.members) {
		return &e.members[i]
	}
	return &e.gateways[i-len(e.members)]
}

func (e *every) set(t *testing.T, p party, patch map[string]any) {
	t.Helper()
	setMember(t, e.Mesh, e.id, p.node, patch)
}

// setAll changes parties at the controller.
func (e *every) setAll(t *testing.T, list []party, patch map[string]any) {
	t.Helper()
	for _, p := range list {
		e.set(t, p, patch)
	}
}

// each checks all pairs of member and gateway at once, and records how that went.
func (e *every) each(t *testing.T, property string, f func(m, g party) error) {
	t.Helper()
	start := time.Now()
	var wg sync.WaitGroup
	for _, m := range e.members {
		for _, g := range e.gateways {
			wg.Go(func() {
				r := row{property, e.root, e.controller, m.name, g.name, passed, 0}
				switch err := f(m, g); {
				case errors.Is(err, errAsReal):
					r.result = asReal
					t.Logf("%s: member %s, gateway %s: %v", property, m.name, g.name, err)
				case err != nil:
					r.result = failed
					t.Errorf("%s: member %s, gateway %s: %v", property, m.name, g.name, err)
				}
				r.took = time.Since(start)
				record(r)
			})
		}
	}
	wg.Wait()
	t.Logf("%s: %v", property, time.Since(start).Round(100*time.Millisecond))
}

// errAsReal says that real ones among themselves don't have a property.
var errAsReal = errors.New("so it is where all are real")

// in connects from behind a gateway to a member.
func in(m, g party, port uint16) error {
	return echoed(g.node.VPC, netip.AddrPortFrom(m.addr, port))
}

// out connects from a member to the host behind a gateway.
func out(m, g party, port uint16) error {
	to := netip.AddrPortFrom(g.addr, port)
	if m.libzt != nil {
		return m.libzt.connect(to)
	}
	return echoed(m.node.NS, to)
}

// both returns an error unless each side reaches the other on a port, or neither
// does if want is false.
func both(m, g party, port uint16, want bool) error {
	return bothWithin(patience, m, g, port, want)
}

func bothWithin(limit time.Duration, m, g party, port uint16, want bool) error {
	check := func(what string, f func(m, g party, port uint16) error) error {
		return testwait.Try(limit, func() error {
			err := f(m, g, port)
			if (err == nil) == want {
				return nil
			}
			if err == nil {
				return fmt.Errorf("%s port %d succeeds", what, port)
			}
			return fmt.Errorf("%s port %d: %w", what, port, err)
		})
	}
	other := make(chan error)
	go func() { other <- check("from the member to", out) }()
	err := check("from the VPC to", in)
	return errors.Join(err, <-other)
}

func (e *every) traffic(t *testing.T) {
	e.each(t, "traffic both ways", func(m, g party) error { return both(m, g, portPlain, true) })
}

// access checks rules, tags and capabilities where they allow and where they
// refuse.
func (e *every) access(t *testing.T) {
	e.each(t, "rules on sending and on receipt", func(m, g party) error {
		return errors.Join(both(m, g, portInbound, false), both(m, g, portOutbound, false), both(m, g, portPlain, true))
	})
	e.each(t, "tag allows", func(m, g party) error { return both(m, g, portTagged, true) })
	e.each(t, "no capability refuses", func(m, g party) error { return both(m, g, portCapability, false) })
	e.setAll(t, e.gateways, map[string]any{"tags": [][]int{{tagDepartment, 2}}, "capabilities": []int{1}})
	e.setAll(t, e.members, map[string]any{"capabilities": []int{1}})
	e.each(t, "tag refuses", func(m, g party) error { return both(m, g, portTagged, false) })
	e.each(t, "capability allows", func(m, g party) error { return both(m, g, portCapability, true) })
	e.setAll(t, e.gateways, map[string]any{"tags": [][]int{{tagDepartment, 1}}, "capabilities": []int{}})
	e.setAll(t, e.members, map[string]any{"capabilities": []int{}})
	e.each(t, "capability taken away refuses", func(m, g party) error { return both(m, g, portCapability, false) })
}

// deauthorise puts all gateways out, and then all members. Real ones don't always
// take notice of it when several of them are put out at once; one after the other
// they do, see TestInteropDeauthorise.
func (e *every) deauthorise(t *testing.T) {
	cut := func(m, g party) error {
		if m.path == "" && m.name != nameLibzt || g.path == "" && g.name != nameLibzt {
			return both(m, g, portPlain, false)
		}
		err := bothWithin(patience/3, m, g, portPlain, false)
		if err != nil {
			err = fmt.Errorf("%w: %w", errAsReal, err)
		}
		return err
	}
	for _, side := range []struct {
		name string
		list []party
	}{{"gateway", e.gateways}, {"member", e.members}} {
		e.setAll(t, side.list, map[string]any{"authorized": false})
		e.each(t, "de-authorised "+side.name+" is cut off both ways", cut)
		e.setAll(t, side.list, map[string]any{"authorized": true})
		e.each(t, side.name+" authorised again", func(m, g party) error { return both(m, g, portPlain, true) })
	}
}

// derivedAddresses are the RFC 4193 and the 6PLANE address of a node (chapter 01
// §6.5).
func derivedAddresses(id ztnode.NetworkID, address string) (rfc4193, sixPlane netip.Addr) {
	node, _ := strconv.ParseUint(address, 16, 64)
	put := func(b []byte) { // 40 bits
		var all [8]byte
		binary.BigEndian.PutUint64(all[:], node)
		copy(b, all[3:])
	}
	a := [16]byte{0: 0xfd, 9: 0x99, 10: 0x93}
	binary.BigEndian.PutUint64(a[1:], uint64(id))
	put(a[11:])
	b := [16]byte{0: 0xfc, 15: 1}
	binary.BigEndian.PutUint32(b[1:], uint32(id>>32)^uint32(id))
	put(b[5:])
	return netip.AddrFrom16(a), netip.AddrFrom16(b)
}

// derived checks the IPv6 addresses that follow from network and node: gateways
// ping members, members ping gateways. The stack in libzt takes one of two.
func (e *every) derived(t *testing.T, property string, id ztnode.NetworkID) {
	e.each(t, property, func(m, g party) error {
		one := func(from, to party) error {
			rfc4193, sixPlane := derivedAddresses(id, to.node.Address)
			answers := func(a netip.Addr) error {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				return from.node.Ping(ctx, a)
			}
			return testwait.Try(patience, func() error {
				err := answers(sixPlane)
				if id>>56 == 0xff || to.libzt != nil && err == nil { // ad-hoc networks have 6PLANE only
					return err
				}
				err4193 := answers(rfc4193)
				if to.libzt != nil {
					return err4193
				}
				return errors.Join(err, err4193)
			})
		}
		err := one(g, m)
		if m.libzt == nil { // it has no ping, but answers
			err = errors.Join(err, one(m, g))
		}
		return err
	})
}

// flow is a connection that stays.
type flow struct {
	c net.Conn
	r *bufio.Reader
	n int
}

// alive returns an error unless a line comes back within some time.
func (f *flow) alive(limit time.Duration) error {
	f.n++
	want := fmt.Sprintf("%d\n", f.n)
	_ = f.c.SetDeadline(time.Now().Add(limit))
	if _, err := io.WriteString(f.c, want); err != nil {
		return err
	}
	if got, err := f.r.ReadString('\n'); err != nil || got != want {
		return fmt.Errorf("got %q back, %w", got, err)
	}
	return nil
}

type pair struct{ member, gateway string }

// openFlows opens a connection from each VPC to each member.
func (e *every) openFlows(t *testing.T) map[pair]*flow {
	flows := map[pair]*flow{}
	for _, m := range e.members {
		for _, g := range e.gateways {
			testwait.NoError(t, 30*time.Second, func() error {
				ctx, cancel := stepContext()
				defer cancel()
				c, err := g.node.VPC.Dial(ctx, "tcp", netip.AddrPortFrom(m.addr, portPlain).String())
				if err == nil {
					t.Cleanup(func() { _ = c.Close() })
					flows[pair{m.name, g.name}] = &flow{c: c, r: bufio.NewReader(c)}
				}
				return err
			})
		}
	}
	return flows
}

// killRoot kills the root. Connections go on, others can be made. When it is back,
// new members can join.
func (e *every) killRoot(t *testing.T, flows map[pair]*flow) {
	e.each(t, "direct paths", func(m, g party) error {
		return testwait.Try(patience, func() error {
			list, err := g.node.Endpoints(context.Background(), m.node)
			if err == nil && len(list) == 0 {
				err = errors.New("no direct path")
			}
			return err
		})
	})
	keepPeers(t, e.Mesh)
	e.Root.Process.Kill()
	e.each(t, "root killed: connections go on, others can be made", func(m, g party) error {
		return errors.Join(flows[pair{m.name, g.name}].alive(patience), both(m, g, portPlain, true))
	})
	bringBack(t, e.Mesh)
	for i, k := range e.impls {
		start := time.Now()
		n, err := e.Add(e.Context(), lab.MeshMember{Name: "late" + strconv.Itoa(i), ZeroTierOne: k.path, Seal: k.seals})
		if err != nil {
			t.Fatal(err)
		}
		number := len(e.Nodes) - 1
		admit(t, e.Mesh, e.id, number, n)
		joinedLate(t, e.Mesh, n, e.id)
		addr := overlayOf(number)
		echoOn(t, n.NS, netip.AddrPortFrom(addr, portPlain))
		late := party{implementation: k, node: n, addr: addr}
		for _, g := range e.gateways {
			r := row{"root is back: new members join", e.root, e.controller, k.name, g.name, passed, 0}
			if err := bothWithin(4*patience, late, g, portPlain, true); err != nil { // real ones announce groups once a minute
				t.Errorf("root is back: new member %s, gateway %s: %v", k.name, g.name, err)
				r.result = failed
			}
			r.took = time.Since(start)
			record(r)
		}
	}
}

// roamPatience is what real nodes need among themselves: one lets go of the other's old
// path after 87 s and asks again for another some 20 s later, or in the round after that.
const roamPatience = 6 * patience

// roam gives gateways and then members other addresses in the underlay.
func (e *every) roam(t *testing.T, flows map[pair]*flow) {
	next := 100
	for _, side := range []struct {
		name string
		list []party
	}{{"gateway", e.gateways}, {"member", e.members}} {
		for _, p := range side.list {
			if err := p.node.Renumber(next); err != nil {
				t.Fatal(err)
			}
			next++
		}
		e.each(t, side.name+" roams: connections go on, others can be made", func(m, g party) error {
			other := make(chan error)
			go func() { other <- flows[pair{m.name, g.name}].alive(roamPatience) }()
			err := testwait.Try(roamPatience, func() error { return errors.Join(in(m, g, portPlain), out(m, g, portPlain)) })
			return errors.Join(err, <-other)
		})
	}
}

// adHoc joins all to a network without a controller.
func (e *every) adHoc(t *testing.T) {
	const id ztnode.NetworkID = 0xff1b581b62000000 // ports 7000 to 7010
	for _, p := range append(e.members[:len(e.members):len(e.members)], e.gateways...) {
		var err error
		if p.libzt != nil {
			err = p.libzt.say("join %s\n", id)
		} else {
			err = p.node.Join(e.Context(), id)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	e.derived(t, "ad-hoc network", id)
}

// echoed returns an error unless a line comes back to a host.
func echoed(from *lab.Namespace, at netip.AddrPort) error {
	ctx, cancel := stepContext()
	defer cancel()
	c, err := from.Dial(ctx, "tcp", at.String())
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
