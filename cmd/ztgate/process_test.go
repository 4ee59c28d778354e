package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/ownnet"
	"ztgate/internal/testwait"
	"ztgate/router/control"
	"ztgate/router/gateway/gatewaytest"
	"ztgate/zerotier/identity"
)

// asProgram makes the test's program be the real one.
const asProgram = "ZTGATE_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

// process is the program in a process of its own.
type process struct {
	*exec.Cmd
	dir    string
	client *control.Client
	log    gatewaytest.Log
}

// secret is an identity for processes: to make one takes as long as it takes, and far
// longer on a busy machine.
var secret = sync.OnceValues(func() (string, error) {
	id, err := identity.Generate(nil)
	if err != nil {
		return "", err
	}
	return id.SecretString(), nil
})

// program returns the program with so many descriptors, 0 = as many as there are.
func program(t *testing.T, files int, args ...string) *process {
	t.Helper()
	dir, err := os.MkdirTemp("", "ztg") // short enough for a unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	text, err := secret()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "identity.secret"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &process{dir: dir, client: control.NewClient(filepath.Join(dir, "s"))}
	script := `exec "$0" "$@"`
	if files > 0 {
		script = fmt.Sprintf("ulimit -n %d; %s", files, script)
	}
	p.Cmd = exec.Command("/bin/sh", append([]string{"-c", script, os.Args[0]}, args...)...)
	p.Env = []string{asProgram + "=1", "ZTGATE_HOME=" + dir, "ZTGATE_SOCKET=" + filepath.Join(dir, "s"), "ZTGATE_CONFIG=", "PATH=" + os.Getenv("PATH")}
	p.Stdout, p.Stderr = &p.log, &p.log
	return p
}

// begin starts the process and waits until it answers.
func (p *process) begin(t *testing.T) {
	t.Helper()
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Process.Kill() })
	testwait.NoError(t, patience, func() error { _, err := p.client.Info(t.Context()); return err })
}

// end stops the process.
func (p *process) end(t *testing.T) {
	t.Helper()
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Errorf("%v\n%s", err, p.log.String())
	}
}

// inOwnNet runs the rest of a test in a network namespace of its own, whose loopback
// is up.
func inOwnNet(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	ownnet.Run(t, func(t *testing.T) {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			t.Fatal(err)
		}
		f(t)
	})
}

// jsonLines parses a log. No number in it may be one that readers round, or look like
// nanoseconds.
func jsonLines(t *testing.T, log string) (out []map[string]any) {
	t.Helper()
	for s := bufio.NewScanner(strings.NewReader(log)); s.Scan(); {
		d := json.NewDecoder(strings.NewReader(s.Text()))
		d.UseNumber()
		var line map[string]any
		if err := d.Decode(&line); err != nil {
			t.Errorf("not JSON: %s", s.Text())
			continue
		}
		for _, key := range []string{"time", "level", "msg"} {
			if _, ok := line[key].(string); !ok {
				t.Errorf("without %s: %s", key, s.Text())
			}
		}
		for key, v := range line {
			if n, ok := v.(json.Number); ok && key != "timestamp" {
				if f, err := n.Float64(); err != nil || f > 1e6 || f < -1e6 {
					t.Errorf("%s is %s: %s", key, n, s.Text())
				}
			}
		}
		out = append(out, line)
	}
	return out
}

// TestJSONLog: every line of a gateway that logs as JSON is JSON, with IDs, words and
// times as text, the last one at a failure too.
func TestJSONLog(t *testing.T) { inOwnNet(t, testJSONLog) }

func testJSONLog(t *testing.T) {
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	p := program(t, 0, "run", "--log-format", "json", "--log-level", "debug", "--port", "0", "--listen=", "--network", nwid.String(), "--target", "tcp://10.0.0.10:443")
	p.begin(t)
	testwait.For(t, patience, "what it waits for", func() bool { return strings.Contains(p.log.String(), "waiting") })
	if err := p.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	testwait.For(t, patience, "the reload", func() bool { return strings.Contains(p.log.String(), "reloaded") })
	p.end(t)
	found := false
	for _, line := range jsonLines(t, p.log.String()) {
		if line["msg"] == "network" {
			found = line["network"] == nwid.String() && line["status"] == "REQUESTING_CONFIGURATION"
		}
	}
	if !found {
		t.Errorf("the log lacks the network:\n%s", p.log.String())
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	bad := filepath.Join(p.dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("log: {format: json}\nprot: 1\nlistne: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		code int
		env  string
		args []string
	}{
		"a port in use":                {1, "", []string{"run", "--log-format=json", "--port", "0", "--listen", busy.Addr().String()}},
		"a member":                     {1, "", []string{"member", "--log-format=json", "--port", "0", "--listen", busy.Addr().String()}},
		"a faulty value":               {2, "", []string{"run", "--network", "x", "--log-format", "json"}},
		"a faulty file":                {2, "", []string{"run", "--config", bad}},
		"an unknown flag":              {2, "", []string{"run", "--netwrok", "x", "--log-format=json"}},
		"an unknown flag, environment": {2, "ZTGATE_LOG_FORMAT=json", []string{"run", "--netwrok"}},
		"json for the command":         {2, "", []string{"-j", "run", "--network", "x", "--log-format", "json"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := program(t, 0, tt.args...)
			p.Env = append(p.Env, tt.env)
			_ = p.Run() // the code says the same
			lines := jsonLines(t, p.log.String())
			if len(lines) == 0 {
				t.Fatal("nothing is logged")
			}
			last := lines[len(lines)-1]
			if last["level"] != "ERROR" || fmt.Sprint(last["exit_code"]) != strconv.Itoa(tt.code) || p.ProcessState.ExitCode() != tt.code {
				t.Errorf("exit code %d, last line %v", p.ProcessState.ExitCode(), last)
			}
		})
	}
}

// TestFewDescriptors: with few descriptors, whoever opens connections to the HTTP
// server doesn't keep the process from answering.
func TestFewDescriptors(t *testing.T) { inOwnNet(t, testFewDescriptors) }

func testFewDescriptors(t *testing.T) {
	const listen = "127.0.0.1:9002"
	const soon = 3 * time.Second // on a busy machine; without bounds it was more than 5
	p := program(t, 256, "member", "--node", "go", "--controller", "--port", "0", "--listen", listen)
	p.begin(t)
	var limit unix.Rlimit
	if err := unix.Prlimit(p.Process.Pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil || limit.Cur != 256 {
		t.Fatalf("%d descriptors, %v", limit.Cur, err)
	}
	answers := func(when string) {
		t.Helper()
		began := time.Now()
		if _, err := p.client.Health(t.Context()); err != nil || time.Since(began) > soon {
			t.Errorf("%s: health by the socket after %v: %v", when, time.Since(began), err)
		}
		began = time.Now()
		c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := c.Get("http://" + listen + "/healthz")
		if err != nil || time.Since(began) > soon {
			t.Errorf("%s: health by HTTP after %v: %v", when, time.Since(began), err)
		} else {
			_ = resp.Body.Close()
		}
	}
	before := memory(t, p.Process.Pid)
	for _, tt := range []struct {
		name, text string
		n          int
	}{
		{"idle", "", 600},
		{"half-sent requests", "GET /metrics HTTP/1.1\r\nHost: x\r\nX-A: ", 6000},
	} {
		var open []net.Conn
		for range tt.n {
			c, err := net.Dial("tcp", listen)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(c, tt.text) // it may be closed already
			open = append(open, c)
		}
		answers(tt.name)
		if grown := memory(t, p.Process.Pid) - before; grown > 40<<20 {
			t.Errorf("%s: memory grew by %d MB", tt.name, grown>>20)
		} else {
			t.Logf("%s: %d MB more", tt.name, grown>>20)
		}
		for _, c := range open {
			_ = c.Close()
		}
	}
	p.end(t)
}

// memory returns the resident set of a process, in bytes.
func memory(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
