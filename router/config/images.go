package config

// Variables of the image zyclonite/zerotier:router that have no setting of ours. It
// forwards by rules of iptables, and ztgate without any; the others are about who owns its files.
const (
	gatewayMode = "ZEROTIER_ONE_GATEWAY_MODE"
	tcpRelay    = "ZT_ALLOW_TCP_FALLBACK_RELAY"
)

// images takes what variables of ZeroTier's images say that isn't the value of one
// setting. Whatever else says something counts more.
func (l *loader) images() {
	if l.env[tcpRelay] == "false" {
		l.weak("tcp_relay", "off", tcpRelay)
	}
	switch mode := l.env[gatewayMode]; mode {
	case "outbound":
	case "inbound": // the VPC opens nothing
		l.weak("policy.default", "drop", gatewayMode)
		l.fromOverlay()
	case "both":
		l.fromOverlay()
	case "":
		if l.env["ZEROTIER_ONE_LOCAL_PHYS"] != "" || l.env["ZEROTIER_ONE_USE_IPTABLES_NFT"] != "" {
			l.warnf("%s isn't set: the router image forwards what the overlay opens then, and ztgate what the VPC opens; say inbound, outbound or both", gatewayMode)
		}
	default:
		l.errorf("%s: %q: use inbound, outbound or both", gatewayMode, mode)
	}
}

// fromOverlay lets overlay hosts open connections to the VPC, which sees this host's own
// address, as the image does.
func (l *loader) fromOverlay() {
	l.weak("vpc.nat_address", natHost, gatewayMode)
	if l.cfg.origin[ruleRecords.key] != "" {
		l.warnf("%s opens nothing: policy.rules says what the overlay may open", gatewayMode)
		return
	}
	l.cfg.origin[ruleRecords.key] = "environment " + gatewayMode
	l.cfg.written.rules = append(l.cfg.written.rules, PolicyRule{Action: "accept", Direction: "in"})
}

// weak sets a value that nothing else has set.
func (l *loader) weak(key, value, variable string) {
	for _, s := range settings {
		if s.key == key && l.cfg.origin[key] == "" {
			l.apply(s, []string{value}, "environment "+variable)
		}
	}
}
