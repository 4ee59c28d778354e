// Package router holds the rooms that make a gateway of a forwarding plane and an
// overlay node that don't know each other:
//
//   - lab, e2e, faults and attack run all of it on one machine, in network namespaces;
//   - sim runs all of it in one goroutine, on a simulated clock;
//   - gateway puts everything together and runs it, as a gateway or a member;
//   - admin is what works without a process: identities, planets, network records;
//   - control is the API of a running process, and its client;
//   - host is the Linux host: interfaces, routes, settings, packets in and out;
//   - plan judges which addresses and routes may be used;
//   - config is the configuration;
//   - fault has the kinds of errors and exit codes.
//
// Imports go down this list only; docs/design.md has the whole of it.
package router
