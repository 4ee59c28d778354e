package router

import (
	"slices"

	"golang.org/x/sys/unix"

	"ztgate/netstack/policy"
)

// compilePolicy translates the configured rules, which are checked already.
func compilePolicy(c PolicyConfig) *policy.Policy {
	action := func(word string) policy.Action {
		switch word {
		case "accept":
			return policy.Accept
		case "reject":
			return policy.Reject
		}
		return policy.Drop
	}
	proto := map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "icmp": unix.IPPROTO_ICMP}
	direction := map[string]policy.Direction{"out": policy.Out, "in": policy.In}
	rules := make([]policy.Rule, len(c.Rules))
	for i, r := range c.Rules {
		rules[i] = policy.Rule{Action: action(r.Action), Proto: proto[r.Proto], From: slices.Clone(r.From), To: slices.Clone(r.To),
			Direction: direction[r.Direction], Network: uint64(r.Network)}
		for _, p := range r.Ports {
			rules[i].Ports = append(rules[i].Ports, policy.PortRange(p))
		}
	}
	return policy.New(action(c.Default), rules)
}
