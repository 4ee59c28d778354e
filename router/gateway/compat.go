package gateway

import (
	"net/http"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/internal/disk"
	"ztgate/router/control"
	"ztgate/router/localapi"
	"ztgate/zerotier/ztnode"
)

// localAPI is the API of zerotier-one's local service, for front ends made for that:
// on the control socket, where nobody is asked for a token, and over TCP if the
// configuration wants it.
func (s *service) localAPI(metrics http.Handler) *localapi.API {
	cfg := s.config()
	return &localapi.API{Process: localProcess{s}, Metrics: metrics, AllowFrom: cfg.API.AllowFrom,
		TCPRelay: cfg.Underlay.TCPRelay != "off", Now: s.now}
}

// guardedAPI is the API for TCP.
func (s *service) guardedAPI(metrics http.Handler) (*localapi.Guard, error) {
	token, err := localapi.Token(disk.OS{}, s.config().Home)
	if err != nil {
		return nil, err
	}
	return localapi.NewGuard(s.localAPI(metrics).Handler(), token, s.config().API.AllowFrom, s.log, s.now), nil
}

// registerGuard exports how requests to the API ended.
func registerGuard(reg prometheus.Registerer, g *localapi.Guard) {
	c := &g.Count
	for result, n := range map[string]interface{ Load() uint64 }{
		"ok": &c.Accepted, "wrong_address": &c.WrongAddress, "wrong_token": &c.WrongToken, "limited": &c.Limited} {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "ztgate_api_requests_total",
			Help: "Requests to the API of the local service, by how they ended.", ConstLabels: prometheus.Labels{"result": result}},
			func() float64 { return float64(n.Load()) }))
	}
}

// localProcess is this process as the API shows it.
type localProcess struct{ s *service }

// Info implements [localapi.Process].
func (p localProcess) Info() control.Info { return p.s.info() }

// Peers leaves out those that nothing comes from: front ends take whoever is listed for
// online.
func (p localProcess) Peers() []ztnode.Peer {
	peers := slices.DeleteFunc(p.s.peers(), func(x ztnode.Peer) bool { return x.Link == linkNone && x.Role == ztnode.RoleLeaf })
	for i := range peers {
		peers[i].Relayed = peers[i].Link != linkDirect
	}
	return peers
}

// Networks implements [localapi.Process].
func (p localProcess) Networks() []control.NetworkView { return p.s.networkViews() }

// Allowed implements [localapi.Process].
func (p localProcess) Allowed(id ztnode.NetworkID) localapi.Allowed {
	return localapi.Allowed{Global: p.s.config().Network(id).AllowGlobal}
}

// Join implements [localapi.Process].
func (p localProcess) Join(id ztnode.NetworkID) error {
	_, err := p.s.join(id.String())
	return err
}

// Leave implements [localapi.Process].
func (p localProcess) Leave(id ztnode.NetworkID) error {
	_, err := p.s.leave(id.String())
	return err
}

// Controller implements [localapi.Process].
func (p localProcess) Controller() http.Handler {
	if c, ok := p.s.node.Controller().(interface{ Handler() http.Handler }); ok {
		return c.Handler()
	}
	return nil
}
