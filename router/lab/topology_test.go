package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
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
)

// helperEnv makes the test binary act as a program of the lab.
const helperEnv = "LABTEST_HELPER"

func TestMain(m *testing.M) {
	switch os.Getenv(helperEnv) {
	case "sleep":
		time.Sleep(time.Minute)
		os.Exit(0)
	case "lab": // brings a lab up and waits to be killed
		t, err := New(context.Background(), os.Args[1])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		n, err := t.Namespace("a")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Setenv(helperEnv, "sleep")
		p, err := t.Start(n, "sleeper", "/proc/self/exe")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(p.PID)
		time.Sleep(time.Minute)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	t.Helper()
	if err := CheckHost(); err != nil {
		t.Skip(err)
	}
}

func testPrefix() string { return DefaultPrefix + "test" + strconv.Itoa(os.Getpid()) }

func newTopology(t *testing.T) *Topology {
	t.Helper()
	needRoot(t)
	top, err := New(context.Background(), testPrefix())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		_ = os.RemoveAll(top.LogDir)
		expectNothing(t, top.Prefix)
	})
	return top
}

func expectNothing(t *testing.T, prefix string) {
	t.Helper()
	for _, pattern := range []string{netnsDir + "/" + prefix + "*", runDir + "/" + prefix + "*"} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestNamespacesAreConnected(t *testing.T) {
	top := newTopology(t)
	var ns [3]*Namespace
	for i, name := range []string{"sw", "a", "b"} {
		var err error
		if ns[i], err = top.Namespace(name); err != nil {
			t.Fatal(err)
		}
	}
	sw, a, b := ns[0], ns[1], ns[2]
	addrA, addrB := netip.MustParsePrefix("203.0.113.1/24"), netip.MustParsePrefix("203.0.113.2/24")
	if err := errors.Join(
		sw.Bridge("br0"),
		Plug(a, "eth0", sw, "br0", "a"), a.AddAddress("eth0", addrA),
		Plug(b, "eth0", sw, "br0", "b"), b.AddAddress("eth0", addrB),
		b.Sysctl("net/ipv4/ip_forward", "1"),
	); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := a.Ping(ctx, addrB.Addr()); err != nil {
		t.Error(err)
	}

	// The office's server and the client, without a gateway between.
	secure, plain, err := listenOffice(ctx, addrB.Addr(), b.Listen)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	serve, stop := context.WithCancel(ctx)
	go func() { done <- serveOffice(serve, addrB.Addr(), secure, plain) }()
	c := a.HTTPClient()
	defer c.CloseIdleConnections()
	if page, err := get(ctx, c, "https://203.0.113.2/"); err != nil || !strings.Contains(page, "203.0.113.1") {
		t.Errorf("page = %q, %v", page, err)
	}
	if who, err := get(ctx, c, "https://203.0.113.2"+pathWhoAmI); err != nil || who != "203.0.113.1" {
		t.Errorf("client address = %q, %v", who, err)
	}
	for name, f := range map[string]func() (Transfer, error){
		"download": func() (Transfer, error) { return download(ctx, c, "http://203.0.113.2", 100*time.Millisecond, 2) },
		"upload":   func() (Transfer, error) { return upload(ctx, c, "http://203.0.113.2", 100*time.Millisecond, 2) },
	} {
		if got, err := f(); err != nil || got.BitsPerSecond() < 1e6 {
			t.Errorf("%s = %+v, %v", name, got, err)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("serveOffice: %v", err)
	}
}

func TestProcessEnd(t *testing.T) {
	top := newTopology(t)
	n, err := top.Namespace("a")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(helperEnv, "sleep")
	p, err := top.Start(n, "sleeper", "/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	// The kernel shows a command line a moment after the program has begun.
	testwait.For(t, 10*time.Second, "the process is recognised", func() bool { return isOurs(p.PID, top.Dir) })
	if _, err := p.CPU(); err != nil {
		t.Error(err)
	}
	if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	<-top.Context().Done()
	if cause := context.Cause(top.Context()); !strings.Contains(cause.Error(), "sleeper ended: signal: killed") {
		t.Errorf("cause = %v, want that the process was killed", cause)
	}
}

// A lab that was killed leaves namespaces and processes; the next one removes
// them, but not while the first is alive.
func TestLeftovers(t *testing.T) {
	needRoot(t)
	prefix := testPrefix() + "k"
	cmd := exec.Command("/proc/self/exe", prefix)
	cmd.Env = append(os.Environ(), helperEnv+"=lab")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	pid, err2 := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || err2 != nil {
		_ = cmd.Process.Kill()
		t.Fatalf("helper says %q: %v", line, errors.Join(err, err2))
	}
	if err := Down(prefix); !errors.Is(err, ErrBusy) {
		t.Errorf("Down beside a living lab: %v, want %v", err, ErrBusy)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if !isOurs(pid, dirOf(prefix)) {
		t.Fatal("the helper's process is gone: nothing to test")
	}
	if err := Down(prefix); err != nil {
		t.Fatal(err)
	}
	if isOurs(pid, dirOf(prefix)) {
		t.Error("the process is still there")
	}
	expectNothing(t, prefix)
	if err := Down(prefix); err != nil {
		t.Errorf("second Down: %v", err)
	}
	logs, _ := filepath.Glob(filepath.Join(os.TempDir(), prefix+"-logs-*"))
	for _, l := range logs {
		_ = os.RemoveAll(l)
	}
}

func TestPrefix(t *testing.T) {
	for _, p := range []string{"", "zg", "zglab/..", "zglab-x", "netns", "zglab\x00"} {
		if err := Down(p); err == nil || errors.Is(err, ErrHost) {
			t.Errorf("Down(%q) = %v, want a refusal of the prefix", p, err)
		}
	}
}

func TestMetrics(t *testing.T) {
	m, err := ParseMetrics(`# TYPE ztgate_forwarded_bytes_total counter
ztgate_forwarded_bytes_total{path="vpc_to_overlay",family="ipv4"} 10
ztgate_forwarded_bytes_total{path="vpc_to_overlay",family="ipv6"} 5
ztgate_forwarded_bytes_total{path="overlay_to_vpc",family="ipv4"} 7
# TYPE ztgate_flows gauge
ztgate_flows{protocol="tcp"} 3
`)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.By("ztgate_forwarded_bytes_total", "path"); got["vpc_to_overlay"] != 15 || got["overlay_to_vpc"] != 7 {
		t.Errorf("by path: %v", got)
	}
	if got := m.Sum("ztgate_forwarded_bytes_total", map[string]string{"family": "ipv4"}); got != 17 {
		t.Errorf("ipv4 sum = %v, want 17", got)
	}
	if got := m.Sum("ztgate_flows", nil); got != 3 {
		t.Errorf("flows = %v, want 3", got)
	}
}
