// Package gatewaytest has what stands around a gateway, in memory, for its tests: a
// node without a network, an office behind it, the device on the VPC side, and a
// controller. The forwarding plane between them is the real one.
package gatewaytest

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"ztgate/router/gateway"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
)

// Node is a node whose state tests set.
type Node struct {
	mu       sync.Mutex
	info     ztnode.Info
	networks map[ztnode.NetworkID]ztnode.Network
	peers    []ztnode.Peer
	groups   map[ztnode.NetworkID][]ztnode.Group
	watchers map[chan struct{}]struct{}
	moons    map[uint64]string // seeds by ID
	ready    chan struct{}
	closed   bool
	ctl      gateway.Controller
	written  [][]byte
	office   *Office // nil = nobody
	onFrames func(uint64, [][]byte)
	failRun  error
	sealed   ztnode.SealedHello
	running  context.CancelFunc
}

var _ gateway.Node = (*Node)(nil)

// NewNode returns an offline node in no network.
func NewNode() *Node {
	return &Node{
		info:     ztnode.Info{Address: "fcd8055969", Identity: "fcd8055969:0:00", Version: "1.14.1", PrimaryPort: 9993},
		networks: map[ztnode.NetworkID]ztnode.Network{}, groups: map[ztnode.NetworkID][]ztnode.Group{},
		watchers: map[chan struct{}]struct{}{}, moons: map[uint64]string{}, ready: make(chan struct{}),
	}
}

// Start takes over a configuration. It is a [gateway.NewNode].
func (n *Node) Start(cfg gateway.NodeConfig) (gateway.Node, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.onFrames, n.sealed = cfg.OnFrames, cfg.Underlay.SealedHello
	if cfg.Controller && n.ctl == nil {
		n.ctl = NewController()
	}
	n.info.Controller = n.ctl != nil
	return n, nil
}

// SetOnline changes the state of the node.
func (n *Node) SetOnline(v bool) { n.change(func() { n.info.Online = v }) }

// SetInfo changes what the node says of itself.
func (n *Node) SetInfo(edit func(*ztnode.Info)) { n.change(func() { edit(&n.info) }) }

// SetNetwork adds or changes a network.
func (n *Node) SetNetwork(nw ztnode.Network) { n.change(func() { n.networks[nw.ID] = nw }) }

// SetPeers replaces the peers.
func (n *Node) SetPeers(p ...ztnode.Peer) { n.change(func() { n.peers = p }) }

// SetController makes the node a controller.
func (n *Node) SetController(c gateway.Controller) {
	n.change(func() { n.ctl = c; n.info.Controller = true })
}

// Fail makes Run return an error.
func (n *Node) Fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.failRun = err
	if n.running != nil {
		n.running()
	}
}

// SetOffice says who answers the frames that are sent.
func (n *Node) SetOffice(o *Office) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.office = o
}

// Receive hands frames to whoever listens to the node.
func (n *Node) Receive(id ztnode.NetworkID, frames ...[]byte) { n.onFrames(uint64(id), frames) }

// Written returns the frames that were sent so far.
func (n *Node) Written() [][]byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.written)
}

// SealedHello returns which HELLOs the node was told to seal.
func (n *Node) SealedHello() ztnode.SealedHello {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sealed
}

// SetSealedHello implements what [gateway] asks of a node that can seal HELLOs.
func (n *Node) SetSealedHello(s ztnode.SealedHello) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sealed = s
}

// Groups returns the subscriptions in a network.
func (n *Node) Groups(id ztnode.NetworkID) []ztnode.Group {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.groups[id]
}

// Closed says whether the node was closed or has ended.
func (n *Node) Closed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}

func (n *Node) change(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	for ch := range n.watchers {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

// Run implements [gateway.Node].
func (n *Node) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	n.mu.Lock()
	n.running = cancel
	n.mu.Unlock()
	close(n.ready)
	<-ctx.Done()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	return n.failRun
}

// Close implements [gateway.Node].
func (n *Node) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	return nil
}

// Ready implements [gateway.Node].
func (n *Node) Ready() <-chan struct{} { return n.ready }

// Info implements [gateway.Node].
func (n *Node) Info() ztnode.Info {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.info
}

// Peers implements [gateway.Node].
func (n *Node) Peers() []ztnode.Peer {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.peers)
}

// Networks implements [gateway.Node].
func (n *Node) Networks() []ztnode.Network {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := []ztnode.Network{}
	for _, nw := range n.networks {
		out = append(out, nw)
	}
	return out
}

// Join implements [gateway.Node].
func (n *Node) Join(id ztnode.NetworkID) error {
	var err error
	n.change(func() {
		if _, ok := n.networks[id]; !ok {
			if len(n.networks) >= ztnode.MaxNetworks {
				err = ztnode.ErrTooManyNetworks
				return
			}
			n.networks[id] = ztnode.Network{ID: id, Status: ztnode.StatusRequesting, Type: "PRIVATE", MTU: 2800}
		}
	})
	return err
}

// Leave implements [gateway.Node].
func (n *Node) Leave(id ztnode.NetworkID) error {
	n.change(func() { delete(n.networks, id) })
	return nil
}

// Orbit waits for a moon for ever.
func (n *Node) Orbit(id uint64, seed identity.Address) error {
	n.change(func() { n.moons[id] = seed.String() })
	return nil
}

// Deorbit forgets a moon.
func (n *Node) Deorbit(id uint64) (used bool, err error) {
	n.change(func() { _, used = n.moons[id]; delete(n.moons, id) })
	return used, nil
}

// Moons lists the moons.
func (n *Node) Moons() []ztnode.Moon {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := []ztnode.Moon{}
	for id, seed := range n.moons {
		out = append(out, ztnode.Moon{ID: fmt.Sprintf("%016x", id), Waiting: true, Seed: seed, Roots: []ztnode.PlanetRoot{}})
	}
	return out
}

// Watch implements [gateway.Node].
func (n *Node) Watch() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.watchers[ch] = struct{}{}
	return ch, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.watchers, ch)
	}
}

// WriteFrames implements [gateway.Node].
func (n *Node) WriteFrames(id uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	var answers [][]byte
	n.mu.Lock()
	office, receive := n.office, n.onFrames
	for i, b := range bufs {
		n.written = append(n.written, slices.Clone(b[offset:offset+sizes[i]]))
	}
	n.mu.Unlock()
	for i, b := range bufs {
		if office == nil {
			break
		}
		if a := office.answer(ztnode.NetworkID(id), b[offset:offset+sizes[i]]); a != nil {
			answers = append(answers, a)
		}
	}
	if len(answers) > 0 {
		receive(id, answers)
	}
	return len(bufs), nil
}

// SetMulticastGroups implements [gateway.Node].
func (n *Node) SetMulticastGroups(id ztnode.NetworkID, groups []ztnode.Group) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.groups[id] = groups
}

// Controller implements [gateway.Node].
func (n *Node) Controller() gateway.Controller {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ctl
}

// RootEndpoints implements gateway.Node.
func (n *Node) RootEndpoints() []netip.AddrPort { return nil }

// SetOverlayPrefixes implements gateway.Node.
func (n *Node) SetOverlayPrefixes([]netip.Prefix) {}
