// Package vl2 holds the formats and rules of ZeroTier's virtual networks
// (chapter 03): network IDs and addresses, the dictionary and the network
// configuration, credentials, frames and multicast messages, and the rules
// engine. It does no I/O and reads no clock; the state machine of a joined
// network is in package network.
//
// Everything parsed is checked and bounded, and errors wrap [ErrMalformed]. What
// was decoded is not changed afterwards and may be read by many goroutines;
// [Membership] and [Assembler] need a lock while they are changed.
//
// Numbers and addresses: [NetworkID], [MACOf], [AddressOf], [SixPlane], [RFC4193],
// [ResolutionGroup], [GroupOf], [EmulateNDP].
//
// A member's configuration: [RequestMetadata] and [AppendConfigRequest] ask for it;
// [ParseChunk], [Chunk.Verify] and [Assembler] collect the answer,
// [DecodeNetworkConfig] reads it, [AdHocConfig] makes one without a controller. A
// controller uses [ParseConfigRequest], [NetworkConfig.Encode] and [AppendChunks].
//
// Credentials: [ParseCredentials] and [AppendCredentials] for messages; [NewCOM],
// [Tag.Sign], [Capability.Issue], [COO.Sign] and [Revocation.Sign] for the
// controller; [Membership] for what a member knows of another one. Offer it only
// what [Credential].Verify accepted.
//
// Frames: [ParseExtFrame], [ParseMulticastFrame], [ParseGather] and their Append
// counterparts. FRAME is 8 bytes of network ID, 2 of ethertype, and the payload.
//
// Rules: [ParseRules] and the JSON form of [Rule] make tables; [Outbound] and
// [Inbound] judge frames. Where [NetworkConfig.AcceptsEtherType] is true they need
// not be asked.
package vl2
