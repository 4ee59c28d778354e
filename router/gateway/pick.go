package gateway

import (
	"fmt"
	"log/slog"
	"net/netip"

	"ztgate/router/config"
	"ztgate/router/host"
	"ztgate/router/host/packet"
)

// pickIngress settles vpc.ingress: auto, once, at the start.
func pickIngress(cfg *config.Config, log *slog.Logger) *config.Config {
	if cfg.VPC.Ingress == config.IngressAuto {
		ingress, why := betterIngress(cfg.VPC, host.Sysctl, func(name string) error {
			d, err := packet.Open(name)
			if err == nil {
				err = d.Close()
			}
			return err
		})
		cfg = cfg.PickIngress(ingress, "auto: "+why)
	}
	log.Info("ingress", "ingress", cfg.VPC.Ingress, "from", cfg.Origin("vpc.ingress"))
	return cfg
}

// betterIngress says which way in a host is set up for, and why. A kernel that forwards
// what comes from clients is what a TUN needs, and what a packet socket mustn't have.
func betterIngress(vpc config.VPCConfig, sysctl func(key string) string, open func(name string) error) (ingress, why string) {
	if len(vpc.Interfaces) != 1 {
		return config.IngressTUN, "vpc.interfaces names no single interface"
	}
	name := vpc.Interfaces[0]
	for _, v6 := range []bool{false, true} {
		if v6 && !sends(vpc, netip.Addr.Is6) {
			continue
		}
		if host.ForwardsFrom(sysctl, name, v6) {
			return config.IngressTUN, "the kernel forwards packets that come by " + name
		}
	}
	if err := open(name); err != nil {
		return config.IngressTUN, err.Error()
	}
	return config.IngressPacket, fmt.Sprintf("the kernel forwards no packets that come by %s, and packet sockets work there", name)
}
