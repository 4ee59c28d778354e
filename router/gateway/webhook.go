package gateway

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/webhook"
	"ztgate/zerotier/ztnode"
)

// admitter is a controller that lets nodes in by what a program answered.
type admitter interface {
	Admit(e ztnode.MemberEvent, patch json.RawMessage) error
}

// newWebhook returns who tells of members, nil if nobody is to be told. It asks for the
// process when it has something to send.
func newWebhook(cfg *config.Config, log *slog.Logger, process func() *service) (*webhook.Sender, error) {
	if cfg.Webhook.URL == "" {
		return nil, nil
	}
	key, err := config.ParseWebhookKey(cfg.Webhook.Secret)
	if err != nil {
		return nil, err
	}
	return webhook.New(webhook.Config{URL: cfg.Webhook.URL, Key: key, UserAgent: "ztgate/" + control.Version, Logger: log,
		Admit: func(e ztnode.MemberEvent, patch json.RawMessage) error {
			c, ok := process().node.Controller().(admitter)
			if !ok {
				return errors.New("this node is no controller")
			}
			return c.Admit(e, patch)
		},
		Endpoint: func(address string) netip.AddrPort { return endpointOf(process().node.Peers(), address) },
	}), nil
}

// endpointOf returns where a peer is reached directly, invalid if it isn't.
func endpointOf(peers []ztnode.Peer, address string) netip.AddrPort {
	for _, p := range peers {
		if p.Address == address {
			path, _ := bestPath(p)
			return path.Endpoint
		}
	}
	return netip.AddrPort{}
}

// registerWebhook exports how messages ended.
func registerWebhook(reg prometheus.Registerer, s *webhook.Sender) {
	c := &s.Count
	for result, n := range map[string]interface{ Load() uint64 }{
		"delivered": &c.Delivered, "failed": &c.Failed, "no_room": &c.NoRoom, "retried": &c.Retried, "authorized": &c.Authorized} {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "ztgate_webhook_messages_total",
			Help: "Messages to the program behind the webhook, by what became of them.", ConstLabels: prometheus.Labels{"result": result}},
			func() float64 { return float64(n.Load()) }))
	}
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "ztgate_webhook_waiting", Help: "Messages to the program behind the webhook that wait."},
		func() float64 { return float64(s.Waiting()) }))
}
