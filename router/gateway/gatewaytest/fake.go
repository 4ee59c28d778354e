// Package gatewaytest has a node, a forwarding plane and a controller without a
// network, for tests of what stands above them.
package gatewaytest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ztgate/router/config"
	"ztgate/router/control"
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
	onFrames func(uint64, [][]byte)
	failRun  error
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

// Start takes over a configuration, as router.Parts.NewNode does.
func (n *Node) Start(cfg gateway.NodeConfig) (gateway.Node, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.onFrames = cfg.OnFrames
	if cfg.Controller && n.ctl == nil {
		n.ctl = NewController()
	}
	n.info.Controller = n.ctl != nil
	return n, nil
}

// SetOnline changes the state of the node.
func (n *Node) SetOnline(v bool) { n.change(func() { n.info.Online = v }) }

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

// Receive hands frames to whoever listens to the node.
func (n *Node) Receive(id ztnode.NetworkID, frames ...[]byte) { n.onFrames(uint64(id), frames) }

// Written returns the frames that were sent so far.
func (n *Node) Written() [][]byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.written)
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

// Run implements router.Node.
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

// Close implements router.Node.
func (n *Node) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	return nil
}

// Ready implements router.Node.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// Info implements router.Node.
func (n *Node) Info() ztnode.Info {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.info
}

// Peers implements router.Node.
func (n *Node) Peers() []ztnode.Peer {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.peers)
}

// Networks implements router.Node.
func (n *Node) Networks() []ztnode.Network {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := []ztnode.Network{}
	for _, nw := range n.networks {
		out = append(out, nw)
	}
	return out
}

// Join implements router.Node.
func (n *Node) Join(id ztnode.NetworkID) error {
	n.change(func() {
		if _, ok := n.networks[id]; !ok {
			n.networks[id] = ztnode.Network{ID: id, Status: ztnode.StatusRequesting, Type: "PRIVATE", MTU: 2800}
		}
	})
	return nil
}

// Leave implements router.Node.
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

// Watch implements router.Node.
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

// WriteFrames implements router.Node.
func (n *Node) WriteFrames(_ uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, b := range bufs {
		n.written = append(n.written, slices.Clone(b[offset:offset+sizes[i]]))
	}
	return len(bufs), nil
}

// SetMulticastGroups implements router.Node.
func (n *Node) SetMulticastGroups(id ztnode.NetworkID, groups []ztnode.Group) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.groups[id] = groups
}

// RootEndpoints implements gateway.Node.
func (n *Node) RootEndpoints() []netip.AddrPort { return nil }

// SetOverlayPrefixes implements gateway.Node.
func (n *Node) SetOverlayPrefixes([]netip.Prefix) {}

// Controller implements router.Node.
func (n *Node) Controller() gateway.Controller {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ctl
}

// Plane is a forwarding plane that forwards nothing.
type Plane struct {
	mu       sync.Mutex
	device   gateway.Device
	networks []gateway.PlaneNetwork
	flows    []control.Flow
	policy   config.PolicyConfig
	mappings []gateway.Mapping
	dialErr  error
	frames   int
}

var _ gateway.Plane = (*Plane)(nil)

// Start takes over a configuration, as router.Parts.NewPlane does.
func (p *Plane) Start(cfg gateway.PlaneConfig) (gateway.Plane, error) {
	p.device, p.mappings = cfg.Device, cfg.Mappings
	return p, nil
}

// SetFlows replaces the flow table.
func (p *Plane) SetFlows(f ...control.Flow) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flows = f
}

// SetDialError makes pings and connects fail.
func (p *Plane) SetDialError(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialErr = err
}

// Networks returns what was set last.
func (p *Plane) Networks() []gateway.PlaneNetwork {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.networks)
}

// Run implements router.Plane.
func (p *Plane) Run(ctx context.Context) error {
	<-ctx.Done()
	if p.device != nil {
		return p.device.Close()
	}
	return nil
}

// SetNetworks implements router.Plane.
func (p *Plane) SetNetworks(nets []gateway.PlaneNetwork) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.networks = nets
	return nil
}

// SetPolicy implements router.Plane.
func (p *Plane) SetPolicy(c config.PolicyConfig) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.policy = c
}

// Policy returns what was set last.
func (p *Plane) Policy() config.PolicyConfig {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.policy
}

// SetTranslation implements router.Plane.
func (p *Plane) SetTranslation([]config.Forward, []config.AddressMap) error { return nil }

// Explain says that everything is masqueraded.
func (p *Plane) Explain(q control.Question) control.Explanation {
	return control.Explanation{Verdict: "forward", Rule: -1, Network: 0x8056c2e21c000001, Translation: "masquerade",
		Route: netip.MustParsePrefix("10.147.17.0/24"), NextHop: q.Destination.Addr(), MTU: 2800,
		Source: netip.MustParseAddrPort("10.147.17.5:0"), Destination: q.Destination}
}

// Deliver implements router.Plane.
func (p *Plane) Deliver(_ uint64, frames [][]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frames += len(frames)
}

// MulticastGroups implements router.Plane.
func (p *Plane) MulticastGroups(ztnode.NetworkID) []ztnode.Group {
	return []ztnode.Group{{MAC: ztnode.MAC{0x33, 0x33, 0, 0, 0, 1}}}
}

// Flows implements router.Plane.
func (p *Plane) Flows(f control.FlowFilter) []control.Flow {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(p.flows), func(fl control.Flow) bool {
		return f.To.IsValid() && !f.To.Contains(fl.Destination.Addr())
	})
}

// Mappings returns those it was started with, and one more.
func (p *Plane) Mappings() []gateway.Mapping {
	return append(slices.Clone(p.mappings), gateway.Mapping{Protocol: 6, Client: netip.MustParseAddrPort("172.31.0.10:4000"),
		External: netip.AddrPortFrom(netip.MustParseAddr("10.147.17.5"), uint16(4000+len(p.mappings)))})
}

// Ping implements router.Plane.
func (p *Plane) Ping(context.Context, netip.Addr) (time.Duration, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return 1500 * time.Microsecond, p.dialErr
}

// DialUDP implements router.Plane.
func (p *Plane) DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	return p.DialTCP(ctx, dst)
}

// DialTCP implements router.Plane.
func (p *Plane) DialTCP(context.Context, netip.AddrPort) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dialErr != nil {
		return nil, p.dialErr
	}
	a, b := net.Pipe()
	return a, b.Close()
}

// Controller keeps records in memory.
type Controller struct {
	mu       sync.Mutex
	networks map[ztnode.NetworkID]map[string]any
	members  map[ztnode.NetworkID]map[string]map[string]any
}

var _ gateway.Controller = (*Controller)(nil)

// NewController returns a controller without networks.
func NewController() *Controller {
	return &Controller{networks: map[ztnode.NetworkID]map[string]any{}, members: map[ztnode.NetworkID]map[string]map[string]any{}}
}

var errUnknown = errors.New("there is no such record")

func merge(record map[string]any, patch json.RawMessage) (json.RawMessage, error) {
	if err := json.Unmarshal(patch, &record); err != nil {
		return nil, err
	}
	return json.Marshal(record)
}

// Networks implements router.Controller.
func (c *Controller) Networks() ([]ztnode.NetworkID, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []ztnode.NetworkID
	for id := range c.networks {
		out = append(out, id)
	}
	slices.SortFunc(out, cmp.Compare[ztnode.NetworkID])
	return out, nil
}

// Network implements router.Controller.
func (c *Controller) Network(id ztnode.NetworkID) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.networks[id] == nil {
		return nil, fmt.Errorf("network %s: %w", id, errUnknown)
	}
	return json.Marshal(c.networks[id])
}

// SetNetwork implements router.Controller.
func (c *Controller) SetNetwork(id ztnode.NetworkID, patch json.RawMessage) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id == 0 {
		id = ztnode.NetworkID(0xfcd8055969000001 + uint64(len(c.networks)))
	}
	if c.networks[id] == nil {
		c.networks[id] = map[string]any{"id": id.String(), "private": true, "mtu": 2800, "revision": 1}
	}
	return merge(c.networks[id], patch)
}

// DeleteNetwork implements router.Controller.
func (c *Controller) DeleteNetwork(id ztnode.NetworkID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.networks, id)
	delete(c.members, id)
	return nil
}

// Members implements router.Controller.
func (c *Controller) Members(id ztnode.NetworkID) ([]json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.networks[id] == nil {
		return nil, fmt.Errorf("network %s: %w", id, errUnknown)
	}
	var out []json.RawMessage
	for _, m := range c.members[id] {
		b, err := json.Marshal(m)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// Member implements router.Controller.
func (c *Controller) Member(id ztnode.NetworkID, address string) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.members[id][address]
	if m == nil {
		return nil, fmt.Errorf("member %s: %w", address, errUnknown)
	}
	return json.Marshal(m)
}

// SetMember implements router.Controller.
func (c *Controller) SetMember(id ztnode.NetworkID, address string, patch json.RawMessage) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.networks[id] == nil {
		return nil, fmt.Errorf("network %s: %w", id, errUnknown)
	}
	if c.members[id] == nil {
		c.members[id] = map[string]map[string]any{}
	}
	if c.members[id][address] == nil {
		c.members[id][address] = map[string]any{"id": address, "authorized": false, "revision": 1}
	}
	return merge(c.members[id][address], patch)
}

// DeleteMember implements router.Controller.
func (c *Controller) DeleteMember(id ztnode.NetworkID, address string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.members[id], address)
	return nil
}
