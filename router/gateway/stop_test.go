package gateway_test

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"ztgate/internal/testwait"
	"ztgate/router/gateway/gatewaytest"
)

// A stop on request takes down what the gateway made, and complains of none of it.
func TestQuietStop(t *testing.T) {
	inNamespace(t, func(t *testing.T, nl *netlink.Handle) {
		vpcHost(t, nl)
		for range 20 {
			dir := shortDir(t)
			cfg := load(t, map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {freePort(t)}, "tun": {"ztgt5"},
				"source": {"172.31.0.0/16"}})
			node := gatewaytest.NewNode()
			node.SetOnline(true)
			node.SetNetwork(okNetwork())
			g := startGateway(t, cfg, node)
			testwait.For(t, patience, "readiness", func() bool { code, _ := readiness(t, cfg); return code == http.StatusOK })
			g.end(t)
			_, last, stopped := strings.Cut(g.logs.String(), "msg=stopping")
			if !stopped || strings.Contains(last, "level=WARN") || strings.Contains(last, "level=ERROR") {
				t.Fatalf("after the request to stop: %s", last)
			}
		}
	})
}
