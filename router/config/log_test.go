package config

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/network"
	"ztgate/zerotier/ztnode"
)

func TestJSONForms(t *testing.T) {
	var out strings.Builder
	log := NewLogger(&out, &Config{LogFormat: "json"})
	log.Info("x", "network", ztnode.NetworkID(0x8056c2e21c000001), "networks", []ztnode.NetworkID{1, 2}, "status", network.StatusOK,
		"after", 1500*time.Millisecond, "pauses", []time.Duration{time.Second, time.Minute}, "world", uint64(1)<<60, "offset", int64(-1)<<60,
		"port", 9993, "error", errors.New("broken"), "addresses", []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")}, "none", []netip.Addr(nil),
		slog.Group("inner", "by", time.Hour), "ok", true, "share", 0.5)
	var got map[string]any
	if err := json.Unmarshal([]byte(out.String()), &got); err != nil {
		t.Fatal(err)
	}
	delete(got, "time")
	b, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"addresses":["10.0.0.1/24"],"after":"1.5s","error":"broken","inner":{"by":"1h0m0s"},"level":"INFO","msg":"x",` +
		`"network":"8056c2e21c000001","networks":["0000000000000001","0000000000000002"],"none":[],"offset":"-1152921504606846976","ok":true,` +
		`"pauses":["1s","1m0s"],"port":9993,"share":0.5,"status":"OK","world":"1152921504606846976"}`
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
}
