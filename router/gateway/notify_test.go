package gateway_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/gateway"
	"ztgate/router/gateway/gatewaytest"
)

// manager is a service manager that writes down what it is told.
type manager struct {
	mu   sync.Mutex
	told []string // lines
}

func newManager(t *testing.T, watchdog time.Duration) *manager {
	t.Helper()
	path := filepath.Join(shortDir(t), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{}
	var reader sync.WaitGroup
	reader.Go(func() {
		b := make([]byte, 1<<16)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			m.mu.Lock()
			m.told = append(m.told, strings.Split(string(b[:n]), "\n")...)
			m.mu.Unlock()
		}
	})
	t.Cleanup(func() { _ = c.Close(); reader.Wait() })
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "")
	if watchdog > 0 {
		t.Setenv("WATCHDOG_USEC", strconv.FormatInt(watchdog.Microseconds(), 10))
	}
	return m
}

// index returns where a line with a prefix is among the first ones after from, -1 if it
// isn't there.
func (m *manager) index(from int, prefix string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := from; i < len(m.told); i++ {
		if strings.HasPrefix(m.told[i], prefix) {
			return i
		}
	}
	return -1
}

func (m *manager) await(t *testing.T, from int, prefix string) int {
	t.Helper()
	if !testwait.Poll(patience, func() bool { return m.index(from, prefix) >= 0 }) {
		m.mu.Lock()
		defer m.mu.Unlock()
		t.Fatalf("the service manager isn't told %s, but %q", prefix, m.told)
	}
	return m.index(from, prefix)
}

// TestServiceManager: ready when the API answers, status as health has it, reloads
// with their end, signs of life, and the stop.
func TestServiceManager(t *testing.T) {
	m := newManager(t, 400*time.Millisecond)
	dir := shortDir(t)
	cfg, err := config.Load(config.Sources{NoFile: true, Flags: map[string][]string{
		"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {""}, "controller": {"true"}}})
	if err != nil {
		t.Fatal(err)
	}
	node := gatewaytest.NewNode()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- gateway.RunMemberWith(ctx, cfg, slog.New(slog.DiscardHandler), node.Start)
	}()
	m.await(t, 0, "STATUS=down: node fcd8055969 is OFFLINE")
	at := m.await(t, 0, "READY=1")
	if _, err := control.NewClient(cfg.Socket).Info(ctx); err != nil {
		t.Errorf("said to be ready, and the API doesn't answer: %v", err)
	}
	at = m.await(t, at, "WATCHDOG=1")
	m.await(t, at+1, "WATCHDOG=1")
	node.SetOnline(true)
	m.await(t, at, "STATUS=ready")
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	at = m.await(t, at, "STOPPING=1")
	m.mu.Lock()
	defer m.mu.Unlock()
	if slices.Contains(m.told[at:], "WATCHDOG=1") {
		t.Errorf("a sign of life after the end: %q", m.told)
	}
}

// TestServiceManagerReload: a reload is told with its end, also one that fails, and
// health says that it failed.
func TestServiceManagerReload(t *testing.T) { inNamespace(t, testServiceManagerReload) }

func testServiceManagerReload(t *testing.T, nl *netlink.Handle) {
	vpcHost(t, nl)
	m := newManager(t, 0)
	dir := shortDir(t)
	path := filepath.Join(dir, "c.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("log: {level: info}\n")
	cfg, err := config.Load(config.Sources{Flags: map[string][]string{"config": {path}, "home": {dir}, "socket": {filepath.Join(dir, "s")},
		"listen": {freePort(t)}, "tun": {"ztgt6"}, "source": {"172.31.0.0/16"}}})
	if err != nil {
		t.Fatal(err)
	}
	node := gatewaytest.NewNode()
	node.SetOnline(true)
	node.SetNetwork(okNetwork())
	g := startGateway(t, cfg, node)
	defer g.end(t)
	at := m.await(t, 0, "READY=1")
	m.await(t, 0, "STATUS=ready")
	write("prot: 1\n")
	if _, err := g.client.Reload(t.Context()); err == nil {
		t.Fatal("a faulty file is put into force")
	}
	at = m.await(t, at+1, "RELOADING=1")
	at = m.await(t, m.await(t, at, "MONOTONIC_USEC="), "READY=1")
	m.await(t, at, "STATUS=degraded: the last reload failed")
	body := get(t, "http://"+cfg.Listen+"/metrics")
	if !strings.Contains(body, "\nztgate_config_last_reload_successful 0\n") {
		t.Errorf("metrics:\n%s", body)
	}
	write("log: {level: warn}\n")
	if _, err := g.client.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	at = m.await(t, at+1, "RELOADING=1")
	m.await(t, m.await(t, at, "READY=1"), "STATUS=ready")
	if body := get(t, "http://"+cfg.Listen+"/metrics"); !strings.Contains(body, "\nztgate_config_last_reload_successful 1\n") {
		t.Errorf("metrics:\n%s", body)
	}
}
