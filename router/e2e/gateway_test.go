//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/netstack"
	"ztgate/router/admin"
	"ztgate/router/lab"
	"ztgate/zerotier/ztnode"
)

// run runs a program in a namespace and fails the test if it fails.
func run(t *testing.T, n *lab.Namespace, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := n.Run(ctx, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

const office = "10.0.0.10"

func fetch(s *lab.Scenario) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := s.VPC.Run(ctx, "curl", "-sSk", "--max-time", "2", "https://"+office+"/")
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if !strings.Contains(string(out), "You come from 10.0.0.1.") {
		return fmt.Errorf("unexpected page %q", out)
	}
	return nil
}

func TestGateway(t *testing.T) {
	// Two hops: the kernel's forwarding to the TUN and ours.
	testGateway(t, start(t, options(t)), "ttl=62", "172.31.0.1")
}

// testGateway tries what a gateway is for. The answer to a ping has this TTL, and the
// first hop of a traceroute this address.
func testGateway(t *testing.T, s *lab.Scenario, ttl, firstHop string) {
	t.Run("curl", func(t *testing.T) {
		if err := fetch(s); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("ping", func(t *testing.T) {
		out := run(t, s.VPC, "ping", "-c", "3", "-i", "0.2", office)
		if !strings.Contains(out, " 0% packet loss") || !strings.Contains(out, ttl) {
			t.Error(out)
		}
	})
	t.Run("large pings", func(t *testing.T) {
		run(t, s.VPC, "ping", "-c", "1", "-s", "8000", office) // fragments
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if out, err := s.VPC.Run(ctx, "ping", "-c", "1", "-M", "do", "-s", "1472", office); err != nil {
			t.Errorf("largest ping without fragments: %s", out)
		}
	})
	t.Run("traceroute", func(t *testing.T) {
		for _, kind := range []string{"-U", "-I", "-T"} {
			out := run(t, s.VPC, "traceroute", "-n", "-q", "1", "-w", "2", "-m", "5", kind, office)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if len(lines) < 3 || !strings.Contains(lines[1], firstHop) || !strings.Contains(lines[len(lines)-1], office) {
				t.Errorf("traceroute %s: want the gateway first and the office last:\n%s", kind, out)
			}
		}
	})
	t.Run("refused port", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		// 7 is "failed to connect"; a lost SYN would end in a timeout, which is 28.
		out, err := s.VPC.Run(ctx, "curl", "-sS", "--max-time", "5", "http://"+office+":81/")
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 7 {
			t.Errorf("want the office's refusal, got %v: %s", err, out)
		}
	})
	t.Run("iperf3", func(t *testing.T) {
		for _, m := range []lab.Iperf{{}, {Reverse: true}, {Streams: 4}, {Streams: 4, Reverse: true},
			{UDP: true, Bitrate: "20M", Length: 1200}, {UDP: true, Bitrate: "20M", Length: 1200, Reverse: true}} {
			m.Duration = time.Second
			got, err := lab.RunIperf(s.Context(), s.Office, s.VPC, lab.OfficeAddress, m)
			if err != nil || got.Bytes == 0 || got.LostPercent > 10 { // a busy machine loses some
				t.Errorf("%+v: %+v, %v", m, got, err)
			}
		}
	})
	t.Run("metrics", func(t *testing.T) {
		m, err := s.Metrics(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"ztgate_packets_total", "ztgate_bytes_total", "ztgate_forwarded_packets_total",
			"ztgate_flows", "ztgate_flows_limit", "ztgate_flows_created_total", "ztgate_flow_cache_hits_total", "ztgate_peers",
			"ztgate_network_status", "ztgate_network_certificate_expiry_timestamp_seconds", "ztgate_wire_crypto_bytes_total",
			"ztgate_target_up", "ztgate_health_status", "ztgate_health_state", "ztgate_network_controller_last_heard_timestamp_seconds",
			"ztgate_build_info", "process_cpu_seconds_total", "go_goroutines"} {
			if name == "ztgate_network_controller_last_heard_timestamp_seconds" && os.Getenv("ZTGATE_E2E_NODE") == "libzt" {
				continue // libzt doesn't say when it heard its controller
			}
			if len(m[name]) == 0 {
				t.Errorf("metric %s is missing", name)
			}
		}
		if up := m.Sum("ztgate_target_up", nil); up != 1 {
			t.Errorf("ztgate_target_up is %v, want 1", up)
		}
	})
	t.Run("garbage", func(t *testing.T) { testGarbage(t, s) })
	t.Run("deauthorised", func(t *testing.T) { testDeauthorise(t, s) })
	t.Run("gateway restarts", func(t *testing.T) { testGatewayRestart(t, s) })
	t.Run("gateway killed", func(t *testing.T) { testGatewayKilled(t, s) })
	t.Run("root restarts", func(t *testing.T) { testRootRestart(t, s) })
}

// testGarbage sends rubbish to the gateway's UDP port: it has to go on working and
// not to grow.
func testGarbage(t *testing.T, s *lab.Scenario) {
	before := rss(t, s.GatewayProcess.PID)
	conn, err := s.Office.Dial(context.Background(), "udp", "203.0.113.10:9993")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	const count = 50_000
	for range count {
		b := make([]byte, r.IntN(1500))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		if len(b) > 28 && r.IntN(2) == 0 { // for the gateway, from somebody unknown, also as fragments
			addr, err := strconv.ParseUint(s.GatewayMember, 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 5 {
				b[8+i] = byte(addr >> (32 - 8*i))
			}
			if r.IntN(3) == 0 {
				b[13], b[14], b[15] = 0xff, byte(r.IntN(256)), 0
			}
		}
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := fetch(s); err != nil {
		t.Fatal(err)
	}
	if grown := rss(t, s.GatewayProcess.PID) - before; grown > 32<<20 {
		t.Errorf("%d datagrams made the process grow by %d MB", count, grown>>20)
	}
}

// rss returns the resident memory of a process in bytes.
func rss(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "VmRSS:" {
			kb, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// testDeauthorise takes the gateway out of the network and puts it back.
func testDeauthorise(t *testing.T, s *lab.Scenario) {
	ctx := context.Background()
	set := func(yes bool) {
		patch, err := admin.MemberSpec{Authorized: &yes}.Patch()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetMember(ctx, s.GatewayMember, patch); err != nil {
			t.Fatal(err)
		}
	}
	set(false)
	limit := 30 * time.Second
	if onLibzt() { // it learns of that only when it asks again, which is every minute
		limit = 100 * time.Second
	}
	err := testwait.Try(limit, func() error {
		nets, err := s.GatewayAPI.Networks(ctx)
		if err == nil && nets.Networks[0].Status != ztnode.StatusDenied {
			err = fmt.Errorf("status is %s", nets.Networks[0].Status)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if fetch(s) == nil {
		t.Error("a gateway that was put out of the network still reaches the office")
	}
	if h, err := s.GatewayAPI.Health(ctx); err != nil || h.Ready {
		t.Errorf("health is %+v, %v", h, err)
	}
	set(true)
	if err := testwait.Try(limit, func() error { return fetch(s) }); err != nil {
		t.Error(err)
	}
}

// testRootRestart shows that traffic goes on without the root, and that the root
// comes back.
func testRootRestart(t *testing.T, s *lab.Scenario) {
	s.RootProcess.Kill()
	if err := fetch(s); err != nil {
		t.Errorf("without a root: %v", err)
	}
	if err := s.StartRoot(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := fetch(s); err != nil {
		t.Error(err)
	}
	if _, err := s.RootAPI.ControllerNetwork(context.Background(), s.Network.String()); err != nil {
		t.Errorf("the controller lost its network: %v", err)
	}
}

func restart(t *testing.T, s *lab.Scenario) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := s.StartGateway(ctx); err != nil {
		t.Fatal(err)
	}
	testwait.NoError(t, 30*time.Second, func() error { return s.AwaitReady(ctx) })
	if err := fetch(s); err != nil {
		t.Error(err)
	}
}

// slowAnswer begins a question whose answer the office gives when it is told to. It returns
// the client's end, which says nothing more, and the office's.
func slowAnswer(t *testing.T, s *lab.Scenario) (client, server net.Conn) {
	t.Helper()
	l, err := s.Office.Listen("tcp", office+":7011")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if client, err = s.VPC.Dial(ctx, "tcp", office+":7011"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	if _, err := fmt.Fprintln(client, "question"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(server).ReadString('\n'); err != nil || line != "question\n" {
		t.Fatalf("the office got %q, %v", line, err)
	}
	testwait.For(t, 5*time.Second, "acknowledgement of the question", func() bool { return unacknowledged(t, client) == 0 })
	return client, server
}

// unacknowledged is how many segments of a connection's own may have to be sent again.
func unacknowledged(t *testing.T, c net.Conn) (n uint32) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		info, e := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err = e; e == nil {
			n = info.Unacked
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// testGatewayRestart stops the gateway, checks that nothing is left, and starts
// it again. An answer that it slept through arrives.
func testGatewayRestart(t *testing.T, s *lab.Scenario) {
	client, server := slowAnswer(t, s)
	before, err := os.ReadFile(filepath.Join(s.GatewayProcess.Home, "identity.secret"))
	if err != nil {
		t.Fatal(err)
	}
	s.GatewayProcess.Stop()
	if out := run(t, s.Gateway, "ip", "-o", "link"); strings.Contains(out, "ztg0") {
		t.Errorf("the TUN is still there:\n%s", out)
	}
	if out := run(t, s.Gateway, "ip", "route"); strings.Contains(out, "10.0.0.0/24") {
		t.Errorf("the route is still there:\n%s", out)
	}
	restart(t, s)
	if _, err := fmt.Fprintln(server, "answer"); err != nil {
		t.Fatal(err)
	}
	if err := client.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(client).ReadString('\n'); err != nil || line != "answer\n" {
		t.Errorf("the answer after the restart: %q, %v", line, err)
	}
	after, err := os.ReadFile(filepath.Join(s.GatewayProcess.Home, "identity.secret"))
	if err != nil || string(after) != string(before) {
		t.Errorf("the identity changed: %v", err)
	}
}

// testGatewayKilled: connections outlive a gateway that is killed, also one whose
// port had been replaced and that speaks before the other owner of the port.
func testGatewayKilled(t *testing.T, s *lab.Scenario) {
	if err := s.VPC.AddAddress("eth0", netip.MustParsePrefix("172.31.0.11/24")); err != nil {
		t.Fatal(err)
	}
	const port = 45_678
	echoLines(t, s.Office, office+":7007")
	dial := func(from string) (net.Conn, *bufio.Reader) {
		var c net.Conn
		if err := s.VPC.Do(func() (err error) {
			d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from), Port: port}}
			c, err = d.Dial("tcp", office+":7007")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		r := bufio.NewReader(c)
		if _, err := r.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		return c, r
	}
	owner, fromOwner := dial("172.31.0.10")
	other, fromOther := dial("172.31.0.11")
	mapped := func() (string, error) {
		f, err := os.Open(filepath.Join(s.GatewayProcess.Home, "nat-mappings.json"))
		if err != nil {
			return "", err
		}
		defer f.Close()
		dec, n := json.NewDecoder(f), 0
		for ; dec.More(); n++ {
			var m netstack.Mapping
			if err := dec.Decode(&m); err != nil {
				return "", err
			}
			if m.Client == netip.MustParseAddrPort("172.31.0.11:45678") {
				return m.External.String(), nil
			}
		}
		return "", fmt.Errorf("the mapping isn't among the %d saved ones", n)
	}
	var before string
	testwait.NoError(t, 30*time.Second, func() (err error) { before, err = mapped(); return err })
	if strings.HasSuffix(before, ":45678") {
		t.Fatalf("both clients have %s", before)
	}
	s.GatewayProcess.Kill()
	restart(t, s)
	for _, c := range []struct {
		conn net.Conn
		r    *bufio.Reader
	}{{other, fromOther}, {owner, fromOwner}} {
		_ = c.conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := fmt.Fprintln(c.conn, "still there"); err != nil {
			t.Error(err)
		}
		if line, err := c.r.ReadString('\n'); err != nil || line != "still there\n" {
			t.Errorf("connection from %s: %q, %v", c.conn.LocalAddr(), line, err)
		}
	}
	if after, err := mapped(); err != nil || after != before {
		t.Errorf("external endpoint %s, %v, before %s", after, err, before)
	}
}

func TestMemory(t *testing.T) {
	s := start(t, options(t))
	if got := rss(t, s.GatewayProcess.PID); got > 64<<20 {
		t.Errorf("an idle gateway takes %d MB", got>>20)
	}
}

// A lab that was killed is cleaned up by the next one, which works.
func TestLabCommand(t *testing.T) {
	o := options(t)
	for i := range 2 {
		cmd := command(t, "lab", "--prefix", o.Prefix, "--duration", "1s")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("run %d: %v\n%s", i+1, err, out)
		}
	}
	cmd := command(t, "lab", "--prefix", o.Prefix, "--duration", "30s")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	testwait.NoError(t, 30*time.Second, func() error {
		c, err := net.Dial("unix", filepath.Join("/run", o.Prefix, "gw", "ztgate.sock"))
		if err == nil {
			err = c.Close()
		}
		return err
	})
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if out, err := command(t, "lab", "--prefix", o.Prefix, "--duration", "1s", "--keep").CombinedOutput(); err != nil {
		t.Fatalf("after kill -9: %v\n%s", err, out)
	}
	if out, err := command(t, "lab", "down", "--prefix", o.Prefix).CombinedOutput(); err != nil {
		t.Fatalf("lab down: %v\n%s", err, out)
	}
	left, err := filepath.Glob("/run/netns/" + o.Prefix + "-*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
