//go:build e2e

package attack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/admin"
	"ztgate/router/lab"
	"ztgate/router/lab/labtest"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
)

// Hosts of the scenario, see package lab, and those of the attackers.
const (
	gwOverlay = "10.0.0.1"
	office    = "10.0.0.10"
	gwVPC     = "172.31.0.1"
	client    = "172.31.0.10"
	greedy    = "172.31.0.66" // another VPC client, which has connections
	silent    = "172.31.0.67" // one that answers nothing, and so sends no RST

	gwWire       = "203.0.113.10:9993"
	officeWire   = "203.0.113.20:9993"
	rootWire     = "203.0.113.1:9993"
	strangerWire = "203.0.113.66"
	spoofable    = "44.0.0.0/8" // networks that lie behind the stranger

	echoPort  = 7
	idlePort  = 8    // of the office: what is left there doesn't meet others' ports
	hostPort  = 8443 // of the gateway's host: forwarded to the office
	entryPort = 2222 // of the gateway in the overlay: forwarded to the client

	patience = 20 * time.Second
)

// configuration of the gateway.
const configuration = `forwards:
  - {listen: "tcp/8443", to: "10.0.0.10:80"}
  - {listen: "tcp/2222", to: "172.31.0.10:7", from: overlay}
dns: {listen: [172.31.0.1], upstreams: [172.31.0.77]} # where nobody is
`

// world is a scenario with a stranger on the wire, and legitimate traffic.
type world struct {
	*lab.Scenario
	t        *testing.T // of the row
	binary   string
	stranger *lab.Namespace

	vpcIndex int                  // of the client's interface
	gwMAC    [8]byte              // of the gateway in the VPC
	planet   *vl1.World           // in use
	gateway  *identity.Identity   // public
	officeID *identity.Identity   // with its secret
	ids      []*identity.Identity // of attackers; making one takes a quarter of a second
	members  map[string]*hostile  // in-process nodes, by name
	ends     []func()             // what close does
	limited  string               // a file: with it the gateway starts with few descriptors
}

// labName begins the prefix of every lab here; the number of the process follows.
const labName = lab.DefaultPrefix + "a"

var labNames = regexp.MustCompile(`^` + labName + `(\d+)-`)

// cleanUp removes the labs that killed runs left.
func cleanUp() (err error) {
	entries, _ := os.ReadDir("/run/netns") // without it there are none
	for _, e := range entries {
		m := labNames.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		pid, _ := strconv.Atoi(m[1])
		if pid > 0 && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			err = errors.Join(err, lab.Down(labName+m[1]))
		}
	}
	return err
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, binary: os.Getenv("ZTGATE"), members: map[string]*hostile{}}
	if w.binary == "" {
		t.Fatal("set ZTGATE to the path of the program to test (make attack does)")
	}
	if err := cleanUp(); err != nil {
		t.Logf("remove what a killed run left: %v", err)
	}
	// The lab starts the gateway by this script, so that one attack can find it with few
	// descriptors, and the others with an API.
	dir := t.TempDir()
	w.limited = filepath.Join(dir, "limited")
	script := filepath.Join(dir, "ztgate")
	enter := ":"
	if *memory != "" {
		g, err := newGroup(*memory)
		if err != nil {
			t.Skip(err)
		}
		t.Cleanup(func() { // after the processes have ended
			taken, err := g.close()
			if err != nil {
				t.Error(err)
			}
			fmt.Println(taken)
		})
		enter = fmt.Sprintf("if [ \"$1\" = run ]; then echo $$ > %s; fi", filepath.Join(g.dir, "cgroup.procs"))
	}
	w.must(os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\n%s\nif [ \"$1\" = run ] && [ -e %s ]; then ulimit -n 256; "+
		"elif [ \"$1\" = run ]; then export ZTGATE_API_LISTEN=%s; fi\nexec %s \"$@\"\n", enter, w.limited, apiAt, w.binary), 0o755))
	s, err := lab.Start(context.Background(), lab.Options{Binary: script, Config: configuration, Progress: io.Discard,
		Prefix: fmt.Sprintf("%s%d", labName, os.Getpid()), LogLevel: "warn"})
	w.Scenario = s
	if s != nil {
		t.Cleanup(w.close)
		w.atEnd(func() {
			if t.Failed() { // the processes of all gateways have the same log
				for line := range strings.Lines(s.GatewayProcess.Tail(20)) {
					t.Log(strings.TrimSpace(line[:min(len(line), 300)]))
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			_ = os.RemoveAll(s.LogDir)
		})
	}
	w.must(err)
	w.addStranger()
	w.must(s.VPC.AddAddress("eth0", netip.MustParsePrefix(greedy+"/24")))
	w.must(s.VPC.Do(func() error {
		l, err := net.InterfaceByName("eth0")
		if err == nil {
			w.vpcIndex = l.Index
		}
		return err
	}))
	w.must(s.Gateway.Do(func() error {
		l, err := net.InterfaceByName("eth-vpc")
		if err == nil {
			copy(w.gwMAC[:], l.HardwareAddr)
		}
		return err
	}))
	// Whatever the VPC's router would take from the gateway goes to the client's
	// namespace, which drops what isn't its own.
	w.sh(s.Gateway, "ip route add 172.31.0.0/16 via "+client)
	w.sh(s.Gateway, fmt.Sprintf("ip neigh replace %s lladdr $(ip netns exec %s cat /sys/class/net/eth0/address) dev eth-vpc nud permanent", silent, s.VPC.Name))
	w.sh(s.Office, "nft 'add table ip a; add chain ip a in { type filter hook input priority 0; }; add rule ip a in udp dport 9 drop; add rule ip a in tcp dport 9 drop'")
	w.gateway, w.officeID = w.storedIdentity("gw").Public(), w.storedIdentity("office")
	b, err := os.ReadFile(filepath.Join(s.Dir, "planet"))
	w.must(err)
	w.planet, _, err = vl1.ParseWorld(b)
	w.must(err)
	w.startServers()
	return w
}

// atEnd runs f when the world is closed, the last one first.
func (w *world) atEnd(f func()) { w.ends = append(w.ends, f) }

// close takes it all down. Closing twice does nothing.
func (w *world) close() {
	for _, f := range slices.Backward(w.ends) {
		f()
	}
	w.ends = nil
}

// addStranger puts a host on the wire, with networks behind it.
func (w *world) addStranger() {
	var err error
	w.stranger, err = w.Namespace("stranger")
	w.must(err)
	w.must(lab.Plug(w.stranger, "eth0", w.Inet, "br0", "stranger"))
	w.must(w.stranger.AddAddress("eth0", netip.MustParsePrefix(strangerWire+"/24")))
	for _, n := range []*lab.Namespace{w.Gateway, w.Root, w.Office} {
		w.sh(n, "ip route add "+spoofable+" via "+strangerWire)
	}
}

func (w *world) must(err error) { w.t.Helper(); labtest.Must(w.t, err) }

func (w *world) sh(n *lab.Namespace, script string) string {
	w.t.Helper()
	return labtest.Shell(w.t, n, script)
}

// storedIdentity reads the identity of a process of the lab.
func (w *world) storedIdentity(name string) *identity.Identity {
	w.t.Helper()
	b, err := os.ReadFile(filepath.Join(w.Dir, name, "identity.secret"))
	w.must(err)
	id, err := identity.Parse(string(b))
	w.must(err)
	return id
}

// identity returns the attackers' identity number i.
func (w *world) identity(i int) *identity.Identity {
	w.t.Helper()
	for len(w.ids) <= i {
		id, err := identity.Generate(rand.Reader)
		w.must(err)
		w.ids = append(w.ids, id)
	}
	return w.ids[i]
}

// authorise lets a node into the network, or puts it out.
func (w *world) authorise(a identity.Address, yes bool, ips ...string) {
	w.t.Helper()
	patch, err := admin.MemberSpec{Authorized: &yes, IPs: ips}.Patch()
	w.must(err)
	w.must(w.SetMember(context.Background(), a.String(), patch))
}

// restart gives the next attack a gateway that remembers nothing of the last one.
func (w *world) restart(few bool) {
	w.t.Helper()
	w.GatewayProcess.Stop()
	for _, name := range []string{"nat-mappings.json", "peers.d", "networks.d"} {
		_ = os.RemoveAll(filepath.Join(w.GatewayProcess.Home, name))
	}
	_ = os.Remove(w.limited)
	if few {
		w.must(os.WriteFile(w.limited, nil, 0o600))
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	w.must(w.StartGateway(ctx))
	w.must(w.AwaitReady(ctx))
}

// serves reports what keeps the gateway from being ready.
func (w *world) serves() error {
	return testwait.Try(5*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		h, err := w.GatewayAPI.Health(ctx)
		if err == nil {
			err = h.Err()
		}
		return err
	})
}

// rss returns the gateway's resident memory in bytes, 0 once it has ended.
func (w *world) rss() int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.GatewayProcess.PID))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			kb, _ := strconv.Atoi(f[1])
			return kb << 10
		}
	}
	return 0
}

// logSize returns the length of the gateway's log.
func (w *world) logSize() int {
	fi, err := os.Stat(w.GatewayProcess.Log)
	w.must(err)
	return int(fi.Size())
}

// pace calls f rate times a second, with 0, 1, 2 and so on, until ctx ends, and
// returns how often. When this machine lets it wait for long it does less: queues of
// the kernel have room for 500 packets, and a burst that fills them isn't what is
// tested here.
func pace(ctx context.Context, rate int, f func(i int)) (done int) {
	const (
		tick     = time.Millisecond
		mostLate = 10 * tick
	)
	t := time.NewTicker(tick)
	defer t.Stop()
	due, last := 0.0, time.Now()
	for {
		select {
		case <-ctx.Done():
			return done
		case <-t.C:
		}
		now := time.Now()
		due += min(now.Sub(last), mostLate).Seconds() * float64(rate)
		last = now
		for ; due >= 1 && ctx.Err() == nil; due-- {
			f(done)
			done++
		}
	}
}

// startServers starts what the legitimate clients talk to.
func (w *world) startServers() {
	for _, s := range []struct {
		n    *lab.Namespace
		port int
	}{{w.Office, echoPort}, {w.Office, idlePort}, {w.VPC, echoPort}} {
		at := fmt.Sprintf(":%d", s.port)
		l, err := s.n.Listen("tcp4", at)
		w.must(err)
		u, err := s.n.ListenPacket("udp4", at)
		w.must(err)
		_ = u.(*net.UDPConn).SetReadBuffer(8 << 20)
		go serveTCP(l)
		go serveUDP(u)
		w.atEnd(func() {
			_ = l.Close()
			_ = u.Close()
		})
	}
}

func serveTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		go func() {
			_, _ = io.Copy(c, struct{ io.Reader }{c}) // without the pipe that it would take to splice
			_ = c.Close()
		}()
	}
}

func serveUDP(u net.PacketConn) {
	b := make([]byte, 2000)
	for {
		k, from, err := u.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = u.WriteTo(b[:k], from)
		}
	}
}

// socket opens a raw socket in a namespace.
func (w *world) socket(n *lab.Namespace, domain, typ, proto int) int {
	w.t.Helper()
	fd := -1
	w.must(n.Do(func() (err error) {
		fd, err = unix.Socket(domain, typ|unix.SOCK_CLOEXEC, proto)
		return err
	}))
	return fd
}
