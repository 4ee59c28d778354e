package gateway_test

import (
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"ztgate/internal/testwait"
	"ztgate/router/control"
	"ztgate/router/gateway/gatewaytest"
)

// What the gateway sends to itself, to see that it works, isn't shown as a packet of a client
// that was refused: neither before there is a network, nor after.
func TestOwnPackets(t *testing.T) {
	for name, flags := range map[string][2]string{
		"an address on the TUN":      {"100.127.255.1/32", "172.31.0.0/16"},
		"of the other family":        {"fd00:99::1/128", "172.31.0.0/16"},
		"none":                       {"none", "172.31.0.0/16"},
		"none, and not for the host": {"none", "172.31.7.0/24"},
	} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T, nl *netlink.Handle) {
				vpcHost(t, nl)
				dir := shortDir(t)
				cfg := load(t, map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {freePort(t)}, "tun": {"ztgt5"},
					"source": {flags[1]}, "address": {flags[0]}})
				node := gatewaytest.NewNode()
				node.SetOnline(true)
				g := startGateway(t, cfg, node)
				defer g.end(t)
				testwait.For(t, patience, "the start", func() bool { code, _ := readiness(t, cfg); return code == http.StatusServiceUnavailable })
				node.SetNetwork(okNetwork())
				testwait.For(t, patience, "the network", func() bool { code, _ := readiness(t, cfg); return code == http.StatusOK })
				beat := time.Millisecond
				if name == "none, and not for the host" { // whose first packet with a network would be the refused one
					beat = 6 * time.Second
				}
				var d control.Drops
				if testwait.Poll(beat, func() (drops bool) {
					var err error
					d, err = g.client.Drops(t.Context())
					return err != nil || len(d.Drops) > 0
				}) {
					t.Errorf("%+v", d)
				}
			})
		})
	}
}
