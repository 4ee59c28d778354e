package gateway_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"ztgate/router/gateway/gatewaytest"
	"ztgate/router/host/tuntap"
)

// TestWriteMethod: status, log and metrics say how packets are written.
func TestWriteMethod(t *testing.T) { inNamespace(t, testWriteMethod) }

func testWriteMethod(t *testing.T, _ *netlink.Handle) {
	for setting, want := range map[string]tuntap.Method{"auto": tuntap.IOUring, "off": tuntap.Writev} {
		t.Run(setting, func(t *testing.T) {
			if setting == "auto" && tuntap.Probe() != nil {
				want = tuntap.Writev
			}
			dir := shortDir(t)
			cfg := load(t, map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {freePort(t)}, "tun": {"ztgt6"}})
			cfg.VPC.IOUring = setting
			g := startGateway(t, cfg, gatewaytest.NewNode())
			defer g.end(t)
			st, err := g.client.Status(t.Context())
			if err != nil || st.Writes == nil || st.Writes.Method != string(want) || (st.Writes.Reason == "") != (want == tuntap.IOUring) {
				t.Errorf("status: %+v, %v", st.Writes, err)
			}
			if setting == "off" && st.Writes.String() != "by writev, since vpc.io_uring is off" {
				t.Error(st.Writes)
			}
			if !strings.Contains(g.logs.String(), "method="+string(want)) {
				t.Errorf("log:\n%s", g.logs)
			}
			metrics := get(t, "http://"+cfg.Listen+"/metrics")
			for _, m := range []tuntap.Method{tuntap.IOUring, tuntap.Writev} {
				line := `ztgate_interface_write_method{method="` + string(m) + `"} 0`
				if m == want {
					line = strings.TrimSuffix(line, "0") + "1"
				}
				if !strings.Contains(metrics, line+"\n") {
					t.Errorf("metrics lack %s", line)
				}
			}
		})
	}
}
