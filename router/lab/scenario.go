package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"ztgate/router/admin"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// Addresses of the scenario. 203.0.113.0/24 counts as private (chapter 01 §6.3),
// so that paths in it are allowed.
var (
	rootInet   = netip.MustParsePrefix("203.0.113.1/24")
	gwInet     = netip.MustParsePrefix("203.0.113.10/24")
	officeInet = netip.MustParsePrefix("203.0.113.20/24")

	gwVPC      = netip.MustParsePrefix("172.31.0.1/24")
	clientVPC  = netip.MustParsePrefix("172.31.0.10/24")
	vpcSources = netip.MustParsePrefix("172.31.0.0/16")

	overlay       = netip.MustParsePrefix("10.0.0.0/24")
	gwOverlay     = netip.MustParseAddr("10.0.0.1")
	officeOverlay = OfficeAddress
)

// OfficeAddress is the office's overlay address.
var OfficeAddress = netip.MustParseAddr("10.0.0.10")

const (
	rootPort      = 9993
	metricsListen = "127.0.0.1:9002"
	officeTUN     = "zt0"
	gatewayTUN    = "ztg0"
)

// Options say how the scenario runs.
type Options struct {
	Binary   string        // our own program, default the one that runs
	Prefix   string        // of names, default [DefaultPrefix]
	Duration time.Duration // of each bulk transfer, default 3 s
	Streams  int           // connections of a bulk transfer, default 1
	Timeout  time.Duration // for everything up to ready, default 60 s
	Keep     bool          // leave all up at the end
	LogLevel string        // of the processes, default info
	Progress io.Writer     // says what is being done; nil = silence

	// Of our gateway:
	Ingress string                // its vpc.ingress; with packet it is a user's process with NET_RAW alone, and its kernel forwards nothing
	Config  string                // text of its configuration file; flags go before it
	Sources []string              // its vpc.sources, default the VPC's subnet
	Targets []string              // default the office's HTTPS; empty but not nil = those of Config
	Prepare func(*Scenario) error // changes namespaces before anything runs in them

	// Who plays root and controller, office and gateway.
	Root, Office, Gateway Program
	ZeroTierOne           string // path of a zerotier-one, for those that are [Reference]
	Seal                  bool   // they seal all their HELLOs
}

func (o *Options) defaults() error {
	if o.Binary == "" {
		var err error
		if o.Binary, err = os.Executable(); err != nil {
			return fmt.Errorf("find own program: %w", err)
		}
	}
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	if o.Root == Libzt {
		return errLibztRoot
	}
	if o.ZeroTierOne == "" && max(o.Root, o.Office, o.Gateway) == Reference {
		return errNoReference
	}
	if o.Duration <= 0 {
		o.Duration = 3 * time.Second
	}
	if o.Streams <= 0 {
		o.Streams = 1
	}
	if o.Timeout <= 0 {
		o.Timeout = time.Minute
	}
	if o.LogLevel == "" {
		o.LogLevel = "info"
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if o.Sources == nil {
		o.Sources = []string{vpcSources.String()}
	}
	if o.Targets == nil {
		o.Targets = []string{fmt.Sprintf("tcp://%s:443", officeOverlay)}
	}
	return nil
}

// Scenario is a running scenario.
type Scenario struct {
	*Topology
	Inet, Root, Office, Gateway, VPC *Namespace

	RootProcess, OfficeProcess, GatewayProcess *Process
	RootAPI, OfficeAPI, GatewayAPI             *control.Client

	Network                                ztnode.NetworkID
	RootAddress, OfficeAddr, GatewayMember string // node addresses

	rootRef, officeRef, gatewayRef *referenceAPI // instead of the APIs above

	opts    Options
	planet  string
	started time.Time // of the gateway
	ready   time.Time
	server  sync.WaitGroup
	stop    context.CancelFunc // of the office server
}

// Run runs the scenario, checks it and takes it down again unless asked to keep
// it. The report is valid even with an error, as far as it got; checks that
// failed are an error.
func Run(ctx context.Context, o Options) (*Report, error) {
	s, err := Start(ctx, o)
	r := &Report{}
	if s == nil {
		return r, err
	}
	if err == nil {
		err = s.Check(r)
	}
	if err != nil && ctx.Err() == nil {
		for _, p := range s.processes {
			r.Logs += p.Tail(15)
		}
	}
	r.LogDir = s.LogDir
	if s.opts.Keep && ctx.Err() == nil {
		err = errors.Join(err, s.keep())
		r.Hints = s.hints()
		return r, err
	}
	err = errors.Join(err, s.Close())
	if err == nil { // the logs are of use after a failure only
		err = os.RemoveAll(s.LogDir)
		r.LogDir = ""
	}
	return r, err
}

// Start brings the scenario up to where the gateway is ready. Unless the first
// result is nil it must be closed, even with an error.
func Start(ctx context.Context, o Options) (*Scenario, error) {
	if err := o.defaults(); err != nil {
		return nil, err
	}
	t, err := New(ctx, o.Prefix)
	if err != nil {
		return nil, err
	}
	s := &Scenario{Topology: t, opts: o}
	ctx, cancel := context.WithTimeout(t.Context(), o.Timeout)
	defer cancel()
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"making network namespaces", s.build},
		{"making identities and the planet", s.credentials},
		{"starting root and controller", s.StartRoot},
		{"making the network", s.makeNetwork},
		{"starting office and gateway", s.startMembers},
		{"waiting for the office to join", s.awaitOffice},
		{"starting the office's web server", s.startServer},
		{"waiting for the gateway to be ready", s.awaitGateway},
	} {
		fmt.Fprintln(o.Progress, step.what)
		if err := step.do(ctx); err != nil {
			if cause := context.Cause(t.Context()); cause != nil {
				err = cause // a process ended: the rest follows from that
			}
			return s, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return s, nil
}

// Close takes the scenario down.
func (s *Scenario) Close() error {
	if s.stop != nil {
		s.stop()
		s.server.Wait()
	}
	return s.Topology.Close()
}

func (s *Scenario) build(context.Context) (err error) {
	for _, n := range []struct {
		name string
		to   **Namespace
	}{{"inet", &s.Inet}, {"root", &s.Root}, {"office", &s.Office}, {"gw", &s.Gateway}, {"vpc", &s.VPC}} {
		if *n.to, err = s.Namespace(n.name); err != nil {
			return err
		}
	}
	if err := s.Inet.Bridge("br0"); err != nil {
		return err
	}
	for _, h := range []struct {
		n    *Namespace
		port string
		addr netip.Prefix
	}{{s.Root, "root", rootInet}, {s.Office, "office", officeInet}, {s.Gateway, "gw", gwInet}} {
		if err := errors.Join(Plug(h.n, "eth-inet", s.Inet, "br0", h.port), h.n.AddAddress("eth-inet", h.addr)); err != nil {
			return err
		}
	}
	if err := Connect(s.Gateway, "eth-vpc", s.VPC, "eth0"); err != nil {
		return err
	}
	err = errors.Join(
		s.Gateway.AddAddress("eth-vpc", gwVPC),
		s.VPC.AddAddress("eth0", clientVPC),
		s.VPC.AddRoute(overlay, gwVPC.Addr()),
		s.Gateway.Sysctl("net/ipv4/ip_forward", map[bool]string{true: "0", false: "1"}[s.opts.Ingress == config.IngressPacket]),
	)
	if err == nil && s.opts.Prepare != nil {
		err = s.opts.Prepare(s)
	}
	return err
}

// credentials makes the identities, which are needed before anything runs: the
// planet names the root, and members are authorised beforehand.
func (s *Scenario) credentials(context.Context) error {
	for _, p := range []struct {
		name string
		to   *string
	}{{"root", &s.RootAddress}, {"office", &s.OfficeAddr}, {"gw", &s.GatewayMember}} {
		home, err := s.Home(p.name)
		if err != nil {
			return err
		}
		id, err := admin.NewIdentity(filepath.Join(home, "identity.secret"), filepath.Join(home, "identity.public"), false)
		if err != nil {
			return err
		}
		*p.to = id.Address
	}
	s.planet = filepath.Join(s.Dir, "planet")
	_, err := admin.WritePlanet(admin.PlanetSpec{
		Roots: []string{fmt.Sprintf("%s=%s/%d", filepath.Join(s.Dir, "root", "identity.public"), rootInet.Addr(), rootPort)},
		Now:   time.Now(),
	}, s.planet, filepath.Join(s.Dir, "planet.key"), false)
	return err
}

// spawn starts one of our processes and returns a client of its control socket.
func (s *Scenario) spawn(n *Namespace, name string, m Program, args ...string) (*Process, *control.Client, error) {
	socket := filepath.Join(s.Dir, name, "ztgate.sock")
	node := config.NodeGo
	if m == Libzt {
		node = config.NodeLibzt
	}
	args = append(args, "--node", node, "--planet", s.planet, "--socket", socket, "--log-level", s.opts.LogLevel)
	binary := s.opts.Binary
	if n == s.Gateway && s.opts.Ingress == config.IngressPacket {
		program, by, err := s.rawOnly(name)
		if err != nil {
			return nil, nil, err
		}
		binary, args = program, append(by, args...)
	}
	p, err := s.Start(n, name, binary, args...)
	return p, control.NewClient(socket), err
}

// StartRoot starts the root, the first time or after it was stopped.
func (s *Scenario) StartRoot(ctx context.Context) (err error) {
	if s.opts.Root == Reference {
		s.RootProcess, s.rootRef, err = s.startReference(s.Root, "root", s.opts.ZeroTierOne, s.planet, s.opts.Seal, nil)
	} else {
		s.RootProcess, s.RootAPI, err = s.spawn(s.Root, "root", s.opts.Root, "member", "--controller", "--port", fmt.Sprint(rootPort), "--listen", "")
	}
	if err != nil {
		return err
	}
	return until(ctx, func() (err error) {
		if s.rootRef != nil {
			_, err = s.rootRef.address(ctx)
		} else {
			_, err = s.RootAPI.Info(ctx)
		}
		return err
	})
}

func (s *Scenario) makeNetwork(ctx context.Context) error {
	patch, err := admin.NetworkSpec{Name: "lab", Pools: []string{"10.0.0.1-10.0.0.254"}, Routes: []string{overlay.String()}}.Patch()
	if err != nil {
		return err
	}
	if s.Network, err = s.createNetwork(ctx, patch); err != nil {
		return err
	}
	yes := true
	for _, m := range []struct {
		name, node string
		ip         netip.Addr
	}{{"office", s.OfficeAddr, officeOverlay}, {"gateway", s.GatewayMember, gwOverlay}} {
		patch, err := admin.MemberSpec{Name: m.name, Authorized: &yes, IPs: []string{m.ip.String()}}.Patch()
		if err != nil {
			return err
		}
		if err := s.SetMember(ctx, m.node, patch); err != nil {
			return err
		}
	}
	return nil
}

func (s *Scenario) createNetwork(ctx context.Context, patch any) (ztnode.NetworkID, error) {
	if s.rootRef != nil {
		rec, err := s.rootRef.createNetwork(ctx, patch)
		if err != nil {
			return 0, err
		}
		return networkOf(rec)
	}
	rec, err := s.RootAPI.CreateNetwork(ctx, patch)
	if err != nil {
		return 0, err
	}
	return networkOf(rec.Record)
}

// SetMember changes a member of the network at whichever controller there is.
func (s *Scenario) SetMember(ctx context.Context, node string, patch any) error {
	if s.rootRef != nil {
		return s.rootRef.setMember(ctx, s.Network, node, patch)
	}
	_, err := s.RootAPI.SetMember(ctx, s.Network.String(), node, patch)
	return err
}

func (s *Scenario) startMembers(ctx context.Context) (err error) {
	if s.opts.Office == Reference {
		s.OfficeProcess, s.officeRef, err = s.startReference(s.Office, "office", s.opts.ZeroTierOne, s.planet, s.opts.Seal, map[ztnode.NetworkID]string{s.Network: officeTUN})
		if err == nil {
			err = until(ctx, func() error { return s.officeRef.join(ctx, s.Network) })
		}
	} else {
		s.OfficeProcess, s.OfficeAPI, err = s.spawn(s.Office, "office", s.opts.Office, "member", "--network", s.Network.String(),
			"--tun", officeTUN, "--listen", "")
	}
	if err != nil {
		return err
	}
	return s.StartGateway(ctx)
}

// SetGatewayProgram says which of our programs the next start of the gateway uses.
func (s *Scenario) SetGatewayProgram(m Program) { s.opts.Gateway = m }

// StartGateway starts the gateway, the first time or after it was stopped.
func (s *Scenario) StartGateway(ctx context.Context) (err error) {
	if s.opts.Config != "" {
		if err := s.WriteConfig(s.opts.Config); err != nil {
			return err
		}
	}
	s.started = time.Now()
	if s.opts.Gateway == Reference {
		s.GatewayProcess, s.gatewayRef, err = s.startReference(s.Gateway, "gw", s.opts.ZeroTierOne, s.planet, s.opts.Seal, map[ztnode.NetworkID]string{s.Network: gatewayTUN})
		if err != nil {
			return err
		}
		if err := until(ctx, func() error { return s.gatewayRef.join(ctx, s.Network) }); err != nil {
			return err
		}
		return masquerade(ctx, s.Gateway, gatewayTUN)
	}
	args := []string{"run", "--network", s.Network.String(), "--tun", gatewayTUN, "--listen", metricsListen, "--interface", "eth-vpc", "--config", s.configPath()}
	for _, p := range s.opts.Sources {
		args = append(args, "--source", p)
	}
	for _, t := range s.opts.Targets {
		args = append(args, "--target", t)
	}
	if s.opts.Ingress != "" {
		args = append(args, "--ingress", s.opts.Ingress)
	}
	s.GatewayProcess, s.GatewayAPI, err = s.spawn(s.Gateway, "gw", s.opts.Gateway, args...)
	return err
}

// nobody is the user of processes with few capabilities.
const nobody = 65534

// rawOnly returns a command that runs our program as a user with NET_RAW alone, and gives
// that user what it needs of the directories.
func (s *Scenario) rawOnly(name string) (program string, args []string, err error) {
	copied := filepath.Join(s.Dir, "ztgate")
	b, err := os.ReadFile(s.opts.Binary)
	if err != nil {
		return "", nil, err
	}
	if err := os.Remove(copied); err != nil && !errors.Is(err, os.ErrNotExist) { // one that runs can't be written
		return "", nil, err
	}
	err = errors.Join(os.WriteFile(copied, b, 0o755), os.Chmod(s.Dir, 0o711), os.Chmod(s.planet, 0o644))
	if err != nil {
		return "", nil, err
	}
	err = filepath.WalkDir(filepath.Join(s.Dir, name), func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, nobody, nobody))
	})
	return "setpriv", []string{"--reuid", fmt.Sprint(nobody), "--regid", fmt.Sprint(nobody), "--clear-groups",
		"--bounding-set", "-all,+net_raw", "--inh-caps", "-all,+net_raw", "--ambient-caps", "-all,+net_raw", "--no-new-privs", copied}, err
}

// configPath returns the path of the gateway's configuration file, "" without one.
func (s *Scenario) configPath() string {
	if s.opts.Config == "" {
		return ""
	}
	return filepath.Join(s.Dir, "gw", "ztgate.yaml")
}

// WriteConfig replaces the gateway's configuration file.
func (s *Scenario) WriteConfig(text string) error {
	s.opts.Config = text
	if _, err := s.Home("gw"); err != nil {
		return err
	}
	return os.WriteFile(s.configPath(), []byte(text), 0o644)
}

func (s *Scenario) awaitOffice(ctx context.Context) error {
	return until(ctx, func() error { return s.Office.hasAddress(officeTUN, officeOverlay) })
}

func (s *Scenario) startServer(ctx context.Context) error {
	if s.opts.Keep {
		// It has to outlive us, so it is a process of its own.
		_, err := s.Start(s.Office, "server", s.opts.Binary, "lab", "office", "--address", officeOverlay.String())
		return err
	}
	secure, plain, err := listenOffice(ctx, officeOverlay, s.Office.Listen)
	if err != nil {
		return err
	}
	ctx, s.stop = context.WithCancel(s.Context())
	s.server.Go(func() {
		if err := serveOffice(ctx, officeOverlay, secure, plain); err != nil {
			s.cancel(err)
		}
	})
	return nil
}

func (s *Scenario) awaitGateway(ctx context.Context) error {
	if err := s.AwaitReady(ctx); err != nil {
		return err
	}
	s.ready = time.Now()
	return nil
}

// AwaitReady waits for the gateway to be ready, which includes a connection to
// the office through the data path.
func (s *Scenario) AwaitReady(ctx context.Context) error {
	if s.gatewayRef != nil {
		return until(ctx, func() error {
			one, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			c, err := s.VPC.Dial(one, "tcp", netip.AddrPortFrom(officeOverlay, 443).String())
			if err == nil {
				err = c.Close()
			}
			return err
		})
	}
	_, err := s.GatewayAPI.Wait(ctx, "ready")
	return err
}

// ReadyAfter returns how long the gateway took from its start to being ready.
func (s *Scenario) ReadyAfter() time.Duration { return s.ready.Sub(s.started) }

// pollEvery is how often a condition is looked at.
const pollEvery = 50 * time.Millisecond

// until calls f until it succeeds. When ctx ends first, the error is f's last.
func until(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", ctx.Err(), err)
		case <-time.After(pollEvery):
		}
	}
}

// OfficeURL returns the base URL of the office's web server as the VPC knows it.
func (s *Scenario) OfficeURL(secure bool) string {
	if secure {
		return "https://" + officeOverlay.String()
	}
	return "http://" + officeOverlay.String()
}

// Client returns an HTTP client in the VPC.
func (s *Scenario) Client() *http.Client { return s.VPC.HTTPClient() }

// Metrics returns the gateway's metrics.
func (s *Scenario) Metrics(ctx context.Context) (Metrics, error) {
	text, err := get(ctx, s.Gateway.HTTPClient(), "http://"+metricsListen+"/metrics")
	if err != nil {
		return nil, err
	}
	return ParseMetrics(text)
}

// keep leaves all up.
func (s *Scenario) keep() error {
	s.Leave()
	return nil
}

func (s *Scenario) hints() []string {
	socket := filepath.Join(s.Dir, "gw", "ztgate.sock")
	return []string{
		fmt.Sprintf("ip netns exec %s curl -k https://%s/", s.VPC.Name, officeOverlay),
		fmt.Sprintf("ip netns exec %s ping %s", s.VPC.Name, officeOverlay),
		fmt.Sprintf("ztgate --socket %s status", socket),
		fmt.Sprintf("ztgate --socket %s flows", socket),
		fmt.Sprintf("ztgate --socket %s controller members %s", filepath.Join(s.Dir, "root", "ztgate.sock"), s.Network),
		fmt.Sprintf("ip netns exec %s curl http://%s/metrics", s.Gateway.Name, metricsListen),
		"ztgate lab down --prefix " + s.opts.Prefix,
	}
}
