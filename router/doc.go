// Package router holds the rooms that make a gateway of a forwarding plane and an
// overlay node that don't know each other:
//
//   - gateway puts everything together and runs it, as a gateway or a member;
//   - plan judges which addresses and routes may be used;
//   - host is the Linux host: interfaces, routes, settings, and the ways in;
//   - control is the API of a running process, and its client;
//   - admin is what works without one: identities, planets, network records;
//   - config is the configuration;
//   - fault has the kinds of errors and exit codes;
//   - lab, e2e and faults run all of it on one machine, in network namespaces.
//
// Imports go down this list only.
package router
