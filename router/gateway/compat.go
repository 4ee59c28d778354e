package gateway

import (
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"ztgate/router/control"
)

// compatRoutes adds what front ends made for zerotier-one's local API need to work
// with our controller (chapter 04 §12, §15.3): its state and /controller. They reach
// the socket through a proxy that the administrator runs.
func (s *service) compatRoutes(mux *http.ServeMux) {
	records := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := s.node.Controller().(interface{ Handler() http.Handler })
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		c.Handler().ServeHTTP(w, r)
	})
	for _, path := range []string{"/controller", "/controller/", "/unstable/controller/"} {
		mux.Handle(path, records)
	}
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		i := s.info()
		control.WriteJSON(w, http.StatusOK, map[string]any{
			"address": i.Address, "publicIdentity": i.Identity, "online": i.Online, "tcpFallbackActive": false,
			"version": i.Version, "clock": time.Now().UnixMilli(),
			"planetWorldId": i.PlanetID, "planetWorldTimestamp": i.PlanetTimestamp,
			"config": map[string]any{"settings": map[string]any{
				"primaryPort": i.PrimaryPort, "secondaryPort": i.SecondaryPort, "tertiaryPort": i.TertiaryPort, "homeDir": i.Home,
				"listeningOn": slashed(i.Listening), "surfaceAddresses": slashed(i.Surface), "portMappingEnabled": i.PortMapping,
			}},
		})
	})
}

// slashed writes endpoints as the reference does, "ip/port".
func slashed(list []netip.AddrPort) []string {
	out := make([]string, len(list))
	for i, ep := range list {
		out[i] = fmt.Sprintf("%s/%d", ep.Addr(), ep.Port())
	}
	return out
}
